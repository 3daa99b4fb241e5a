"""Run a command: compose the config, check it, run; a refusal is one line, before any folder is made.

Imports no torch: ``--help``, ``--cfg`` and a misspelt key are answered at once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sdtune.cli.messages import one_line
from sdtune.config.compose import Prepare, compose, run_folder, search_path
from sdtune.config.hydra_compat import Hydra, get_args_parser, print_info
from sdtune.errors import PRUNED, STOPPED, Pruned, RunFailed, Stopped
from sdtune.files import locked
from sdtune.hardware.processes import is_global_zero
from sdtune.log_filters import quiet, quiet_libraries
from sdtune.paths import config_folder
from sdtune.runs.compare import BEGUN_OTHERWISE
from sdtune.sweeps.sweep import multirun

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

EXIT_INVALID_INPUT = 2
"""Exit code of a refusal: bad input, nothing done."""

_SECRET = re.compile(r"(^|[._])(api_?key|token|password|secret)s?$", re.IGNORECASE)


def lazy_command(module: str) -> Prepare:
    """``module``'s ``prepare``, imported when it is called: a command answers ``--help`` without torch."""

    def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
        quiet()
        with gc_disabled():
            work = importlib.import_module(module)
        quiet_libraries()
        run: Callable[[DictConfig], Any] = work.prepare(config, folder)
        return run

    return prepare


@contextlib.contextmanager
def gc_disabled() -> Iterator[None]:
    """What is imported within is for good: the collector does not look at it, nor at what lives beside it, again.

    The libraries are half a million objects; to go through them is a quarter of a second, many times a start.
    """
    before, enabled = len(sys.modules), gc.isenabled()
    gc.collect()  # what is garbage would be for good too
    gc.disable()
    try:
        yield
        if len(sys.modules) > before:
            gc.freeze()
    finally:
        if enabled:
            gc.enable()


def refuse(message: str, code: int = EXIT_INVALID_INPUT) -> NoReturn:
    """One line on stderr, and out."""
    print(f"sdtune: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def launch(
    command: str,
    argv: list[str],
    prepare: Prepare,
    *,
    rewrite: Callable[[list[str]], list[str]] = lambda argv: argv,
    writes: bool = True,
) -> None:
    """Run ``command`` with the arguments ``argv``.

    Args:
        command: name of the top config, ``conf/<command>.yaml``.
        argv: Hydra's options and overrides.
        prepare: see :data:`Prepare`.
        rewrite: what becomes of the arguments before Hydra sees them.
        writes: whether it leaves a folder behind; one that does not is no job of Hydra's.
    """
    typed = argv
    try:
        argv = rewrite(argv)
    except ValueError as error:
        refuse(str(error))
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.multirun and args.cfg:
        refuse("--cfg: shows the config of one job; leave out -m, and give one value where the sweep has several")
    if args.help or args.hydra_help or args.cfg or args.info is not None or args.shell_completion:
        args.config_path = None
        print_info(args, parser, str(config_folder()), args.config_name or command)
        return
    for option, value in (
        ("-cn", args.config_name),
        ("-cp", args.config_path),
        ("--experimental-rerun", args.experimental_rerun),
    ):
        if value:
            refuse(f"{option}: sdtune has one top config per command; name a recipe with -cd DIR experiment={value}")
    for override in args.overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        # data.token and new_tokens are words of a prompt, and max_tokens is how many it may have.
        if _SECRET.search(key) and not key.startswith(("data.", "new_tokens", "backbone.max_tokens")):
            refuse(f"{key}: secrets are taken from the environment only; a command line ends up in logs and in .hydra/")
    if args.multirun and not writes:
        refuse(f"--multirun: sdtune {command} runs once; leave it out")
    if args.multirun and "TORCHELASTIC_RUN_ID" in os.environ:
        refuse("--multirun: torchrun would run the whole sweep in every process; give hardware.devices=N without it")
    code = 0
    try:
        search = search_path(args.config_dir)
        config = compose(command, search, args.overrides) if not args.multirun else None
        if config is None:
            code = multirun(command, search, args.overrides, prepare)
        elif not writes:
            prepare(config, run_folder(config))(config)
        else:
            _run(command, search, args.overrides, config, prepare)
    except Stopped as stop:
        print(f"sdtune: {stop}", file=sys.stderr)
        code = stop.code
    except Pruned as end:
        # Lightning kills the first process where another ends with a code, and it has its loggers to close.
        if is_global_zero():
            print(f"sdtune: {end}", file=sys.stderr)
            code = PRUNED
    except (HydraException, OmegaConfBaseException) as error:
        refuse(_said(error, typed))
    except ValueError as error:
        if os.environ.get("SDTUNE_TRACEBACK") or not _ours(error):
            raise
        refuse(str(error))
    except RunFailed as error:
        if is_global_zero() or not error.agreed:
            refuse(str(error), code=1)
    except RuntimeError as error:
        if os.environ.get("SDTUNE_TRACEBACK") or not _out_of_memory(error):
            raise
        refuse(
            "out of memory on the device: draw fewer images at once (sampling.batch_size=1,"
            " hardware.vae_tiling=true), or choose hardware=cpu",
            code=1,
        )
    except KeyboardInterrupt:
        refuse(STOPPED, code=130)
    except OSError as error:
        if os.environ.get("SDTUNE_TRACEBACK") or error.errno is None:
            raise
        refuse(f"{error.filename or 'output'}: {error.strerror}; name a place that can be read and written", code=1)
    if code:
        raise SystemExit(code)


def _said(error: Exception, typed: list[str]) -> str:
    """What could not be composed: of ``typed``, or of the overrides that a resumed run repeats."""
    line = one_line(error)
    resumed = next((word for word in typed if word.startswith("resume=") and word != "resume=null"), None)
    if resumed is None or any(word.lstrip("+~").startswith(re.split("[:=]", line)[0]) for word in typed):
        return line
    return f"{line}; {resumed} repeats it: {BEGUN_OTHERWISE}"


def _ours(error: Exception) -> bool:
    """Whether sdtune itself raised ``error``: a library's is a fault to be traced, not a refusal of bad input."""
    place = error.__traceback__
    assert place is not None
    while place.tb_next is not None:
        place = place.tb_next
    return str(place.tb_frame.f_globals.get("__name__", "")).split(".")[0] in ("sdtune", "__main__")


def _out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _writable(folder: Path) -> None:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"hydra.run.dir: {folder} cannot be made: {place} is not a folder that can be written to")


def _run(command: str, search: ConfigSearchPath, overrides: list[str], config: DictConfig, prepare: Prepare) -> None:
    folder = run_folder(config)
    torchrun = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ
    if torchrun and not any(override.startswith("hydra.run.dir=") for override in overrides):
        # Each process composes by itself, and the time in a folder's name may be another for each.
        raise ValueError("hydra.run.dir is missing: under torchrun every process must be told the run's folder")
    _writable(folder)
    run = prepare(config, folder)
    existed = folder.exists()
    raised: list[Exception] = []

    def guarded(composed: DictConfig) -> Any:
        # Raised through Hydra, an error would come with lines of its own about the job.
        try:
            return run(composed)
        except Exception as error:
            raised.append(error)
            return None

    # Hydra composes once more, and a time in the folder's name would be another by then.
    fixed = [*overrides, "hydra.run.dir='" + str(folder).replace("'", "\\'") + "'"]
    hydra = Hydra.create_main_hydra2(task_name=command, config_search_path=search)
    try:
        with locked(folder) if is_global_zero() else contextlib.nullcontext():
            hydra.run(config_name=command, task_function=guarded, overrides=fixed, with_log_configuration=True)
    except SystemExit:
        _clear(folder, existed)
        raise
    finally:
        GlobalHydra.instance().clear()
    if raised:
        if isinstance(raised[0], ValueError):
            _clear(folder, existed)
        raise raised[0]


def _clear(folder: Path, existed: bool) -> None:
    """Leave no folder of a run that had not begun."""
    if not existed and not (folder / "metrics.csv").exists() and not any(folder.glob("checkpoints/*")):
        shutil.rmtree(folder, ignore_errors=True)
