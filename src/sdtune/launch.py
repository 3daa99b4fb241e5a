"""From a command line to a run: compose, check, run; every refusal is one line, before any folder is made.

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

from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sdtune.errors import PRUNED, Pruned, RunFailed, Stopped
from sdtune.files import locked
from sdtune.paths import command_line_folder, config_folder
from sdtune.quiet import quiet, quiet_libraries
from sdtune.suggest import suggestion
from sdtune.sweeps import multirun

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

REFUSED = 2
"""Exit code of a refusal: bad input, nothing done."""

_SECRET = re.compile(r"(^|[._])(api_?key|token|password|secret)s?$", re.IGNORECASE)


_OF_FOLDERS = ("data.path", "data.prompt", "data.trigger", "data.repeats", "data.hold_out", "data.validation_path")

Prepare = Callable[[DictConfig, Path], Callable[[DictConfig], Any]]
"""Checks a composed config and the folder it is to write to, and gives the function that runs it; loads no weights."""


def quietly(module: str) -> Prepare:
    """``module``'s ``prepare``, imported when it is called: a command answers ``--help`` without torch."""

    def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
        quiet()
        with _uncollected():
            work = importlib.import_module(module)
        quiet_libraries()
        run: Callable[[DictConfig], Any] = work.prepare(config, folder)
        return run

    return prepare


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
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


def refuse(message: str, code: int = REFUSED) -> NoReturn:
    """One line on stderr, and out."""
    print(f"sdtune: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def main(
    command: str,
    prepare: Prepare,
    *,
    rewrite: Callable[[list[str]], list[str]] = lambda argv: argv,
    writes: bool = True,
) -> None:
    """Run ``command`` with ``sys.argv``.

    Args:
        command: name of the top config, ``conf/<command>.yaml``.
        prepare: see :data:`Prepare`.
        rewrite: what becomes of the arguments before Hydra sees them.
        writes: whether it leaves a folder behind; one that does not is no job of Hydra's.
    """
    try:
        argv = rewrite(sys.argv[1:])
    except ValueError as error:
        refuse(str(error))
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.multirun and args.cfg:
        refuse("--cfg: shows the config of one job; leave out -m, and give one value where the sweep has several")
    if args.help or args.hydra_help or args.cfg or args.info is not None or args.shell_completion:
        _ask_hydra(command, args, parser)
        return
    for option, value in (
        ("-cn", args.config_name),
        ("-cp", args.config_path),
        ("--experimental-rerun", args.experimental_rerun),
    ):
        if value:
            refuse(f"{option}: sdtune has one top config a command; name a recipe with -cd DIR experiment={value}")
    for override in args.overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        # data.token and new_tokens are words of a prompt, and max_tokens is how many it may have.
        if _SECRET.search(key) and not key.startswith(("data.", "new_tokens", "backbone.max_tokens")):
            refuse(f"{key}: secrets are taken from the environment only; a command line ends up in logs and in .hydra/")
    if args.multirun and not writes:
        refuse(f"--multirun: sdtune {command} runs once; leave it out")
    if args.multirun and "TORCHELASTIC_RUN_ID" in os.environ:
        refuse("--multirun: torchrun would run the whole sweep in every process; give hardware.devices=N without it")
    search = _search_path(args.config_dir)
    try:
        config = _compose(command, search, args.overrides) if not args.multirun else None
    except (HydraException, OmegaConfBaseException) as error:
        refuse(_one_line(error))
    code = 0
    try:
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
        if _is_first():
            print(f"sdtune: {end}", file=sys.stderr)
            code = PRUNED
    except (HydraException, OmegaConfBaseException) as error:
        refuse(_one_line(error))
    except ValueError as error:
        if os.environ.get("SDTUNE_TRACEBACK") or not _ours(error):
            raise
        refuse(str(error))
    except RunFailed as error:
        if _is_first() or not error.agreed:
            refuse(str(error), code=1)
    except RuntimeError as error:
        if os.environ.get("SDTUNE_TRACEBACK") or not _out_of_memory(error):
            raise
        refuse(
            "out of memory on the device: draw fewer pictures at once (sampling.batch_size=1,"
            " hardware.vae_tiling=true), or choose hardware=cpu",
            code=1,
        )
    except KeyboardInterrupt:
        refuse("stopped; a training that has begun goes on with sdtune train resume=RUN", code=130)
    except OSError as error:
        if os.environ.get("SDTUNE_TRACEBACK") or error.errno is None:
            raise
        refuse(f"{error.filename or 'output'}: {error.strerror}; name a place that can be read and written", code=1)
    if code:
        raise SystemExit(code)


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


def _ask_hydra(command: str, args: Any, parser: Any) -> None:
    args.config_path = None
    _run_hydra(args, parser, lambda config: None, str(config_folder()), args.config_name or command)


def _search_path(extra: str | None) -> ConfigSearchPath:
    search = create_config_search_path(str(config_folder()))
    if extra is not None:
        folder = Path(extra).absolute()
        if not folder.is_dir():
            refuse(f"--config-dir: {extra} is not a folder")
        search.prepend(provider="command-line", path=f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    return search


def _compose(command: str, search: ConfigSearchPath, overrides: list[str]) -> DictConfig:
    hydra = Hydra.create_main_hydra2(task_name=command, config_search_path=search)
    try:
        config: DictConfig = hydra.compose_config(
            config_name=command, overrides=overrides, run_mode=RunMode.RUN, with_log_configuration=False
        )
        return config
    finally:
        GlobalHydra.instance().clear()


def composed_again(config: DictConfig, group: str, option: str) -> DictConfig:
    """What the command line of a composed ``config`` gives with another choice for ``group``."""
    overrides = [o for o in config.hydra.overrides.task if not o.startswith(f"{group}=")]
    return _compose(config.hydra.job.name, _search_path(_own_folder(config)), [*overrides, f"{group}={option}"])


def choices(config: DictConfig, group: str) -> list[str]:
    """The options of ``group``, those of the command line's ``--config-dir`` too."""
    folders = [config_folder(), *([Path(own)] if (own := _own_folder(config)) else [])]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def _own_folder(config: DictConfig) -> str | None:
    return command_line_folder(config.hydra.runtime.config_sources)


def run_folder(config: DictConfig) -> Path:
    """Where the run of a composed ``config`` (Hydra's own part included) writes."""
    return Path(str(config.hydra.run.dir)).expanduser()


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
        with locked(folder) if _is_first() else contextlib.nullcontext():
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


def _is_first() -> bool:
    """Whether this process speaks for the run, of those that a launcher has started for it."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _clear(folder: Path, existed: bool) -> None:
    """Leave no folder of a run that had not begun."""
    if not existed and not (folder / "metrics.csv").exists() and not any(folder.glob("checkpoints/*")):
        shutil.rmtree(folder, ignore_errors=True)


def _one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's messages run over several lines; the first two say what is wrong."""
    text = str(error)
    if several := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", text):
        return (
            f"{several[1]}: {several[2]} are several values; add -m for a run of each, or write a list: [{several[2]}]"
        )
    unknown = re.search(r"Key '([^']+)' is not in struct.*?full_key: (\S+)", text, re.DOTALL)
    if unknown or "Could not override" in text:
        full = unknown.group(2) if unknown else re.findall(r"'([^']+)'", text)[0]
        if full in _OF_FOLDERS:
            return f"{full}: there is no such setting here; pictures of your own need data=folder"
        return f"{full}: there is no such setting{_close(full, error)}"
    choice = re.search(r"Could not find '([^']+)'(.*)", text, re.DOTALL)
    if choice:
        group, _, name = choice.group(1).rpartition("/")
        options = re.findall(r"^\t(\S+)$", choice.group(2), re.MULTILINE)
        return f"{group}={name}: there is no such choice{suggestion(name, options)}"
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        quoted = value.replace('"', r"\"")
        return f"{key}: {value} cannot be read as it stands; quote it for Hydra and for the shell: '{key}=\"{quoted}\"'"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[:2])


def _close(full: str, error: Exception) -> str:
    """Where the first unknown part of the key stands, and what was probably meant."""
    node: Any = None
    at: BaseException | None = error
    while at is not None and not isinstance(node, DictConfig):
        node, at = getattr(at, "parent_node", None), at.__cause__
    if not isinstance(node, DictConfig):
        return ""
    known, parts = [str(key) for key in node], full.split(".")
    depth = len(str(node._get_full_key(None)).split(".")) if node._get_full_key(None) else 0
    return suggestion(parts[min(depth, len(parts) - 1)], known)
