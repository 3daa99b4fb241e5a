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
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from sdtune.cli.exit_codes import exit_codes, refuse
from sdtune.cli.messages import composition_error
from sdtune.config.compose import Prepare, compose, run_folder, search_path
from sdtune.config.hydra_compat import get_args_parser, initialized, print_info
from sdtune.errors import UserError
from sdtune.files import locked
from sdtune.hardware.processes import is_global_zero, is_launched_again, is_torchrun
from sdtune.log_filters import quiet, quiet_libraries
from sdtune.paths import config_folder
from sdtune.quoting import override
from sdtune.sweeps.sweep import multirun

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

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


def launch(
    command: str,
    argv: list[str],
    prepare: Prepare,
    *,
    rewrite: Callable[[list[str]], list[str]] = lambda argv: argv,
    writes: bool = True,
) -> None:
    """Run ``command`` with the arguments ``argv``; ends the process where that fails (:func:`exit_codes`).

    Args:
        command: name of the top config, ``conf/<command>.yaml``.
        argv: Hydra's options and overrides.
        prepare: see :data:`Prepare`.
        rewrite: what becomes of the arguments before Hydra sees them.
        writes: whether it leaves a folder behind; one that does not is no job of Hydra's.
    """
    with exit_codes(command, partial(composition_error, typed=argv)):
        parser = get_args_parser()
        args = parser.parse_args(rewrite(_with_quoted_folder(argv)))
        if args.multirun and args.cfg:
            refuse("--cfg: shows the config of one job; leave out -m, and give one value where the sweep has several")
        _check_secrets(args.overrides)
        if args.help or args.hydra_help or args.cfg or args.info is not None or args.shell_completion:
            args.config_path = None
            print_info(args, parser, str(config_folder()), args.config_name or command)
            return
        _check_options(command, args, writes)
        search = search_path(args.config_dir)
        if args.multirun:
            code = multirun(command, search, args.overrides, prepare)
            if code:
                raise SystemExit(code)
            return
        config = compose(command, search, args.overrides)
        folder = run_folder(config)
        if writes:
            _check_folder(folder, args.overrides)
        work = prepare(config, folder)
    with exit_codes(command):
        if writes:
            _run_job(command, search, args.overrides, folder, work)
        else:
            work(config)


def _with_quoted_folder(argv: list[str]) -> list[str]:
    """``argv``, with the run's folder quoted for Hydra where Lightning has put it between plain quotes.

    Its launcher appends ``hydra.run.dir="FOLDER"`` to the command line of each further process.
    """
    prefix = 'hydra.run.dir="'
    last = max((place for place, text in enumerate(argv) if text.startswith(prefix)), default=None)
    if last is None or not is_launched_again():
        return argv
    folder = argv[last].removeprefix(prefix).removesuffix('"')
    return [*argv[:last], override("hydra.run.dir", folder), *argv[last + 1 :]]


def _check_secrets(overrides: list[str]) -> None:
    for given in overrides:
        key = given.split("=", 1)[0].lstrip("+~")
        # data.token and new_tokens are words of a prompt, and max_tokens is how many it may have.
        if _SECRET.search(key) and not key.startswith(("data.", "new_tokens", "backbone.max_tokens")):
            refuse(f"{key}: secrets are taken from the environment only; a command line ends up in logs and in .hydra/")


def _check_options(command: str, args: Namespace, writes: bool) -> None:
    """Refuse Hydra options that sdtune does not support."""
    for option, value in (
        ("-cn", args.config_name),
        ("-cp", args.config_path),
        ("--experimental-rerun", args.experimental_rerun),
    ):
        if value:
            refuse(f"{option}: sdtune has one top config per command; name a recipe with -cd DIR experiment={value}")
    if args.multirun and not writes:
        refuse(f"--multirun: sdtune {command} runs once; leave it out")
    if args.multirun and is_torchrun():
        refuse("--multirun: torchrun would run the whole sweep in every process; give hardware.devices=N without it")


def _check_folder(folder: Path, overrides: list[str]) -> None:
    several = is_torchrun() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not any(given.startswith("hydra.run.dir=") for given in overrides):
        # Each process composes by itself, and the time in a folder's name may be another for each.
        raise UserError("hydra.run.dir is missing: under torchrun every process must be told the run's folder")
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{folder} cannot be made: {place} is not a folder that can be written to", key="hydra.run.dir")


def _run_job(
    command: str, search: ConfigSearchPath, overrides: list[str], folder: Path, work: Callable[[DictConfig], Any]
) -> None:
    """Have Hydra run ``work`` as a job in ``folder``, which is removed where the work refuses its input."""
    existed = folder.exists()
    raised: list[Exception] = []

    def guarded(composed: DictConfig) -> Any:
        # Raised through Hydra, an error would come with lines of its own about the job.
        try:
            return work(composed)
        except Exception as error:
            raised.append(error)
            return None

    # Hydra composes once more, and a time in the folder's name would be another by then.
    fixed = [*overrides, override("hydra.run.dir", folder)]
    try:
        with (
            locked(folder) if is_global_zero() else contextlib.nullcontext(),
            initialized(command, search) as hydra,
        ):
            hydra.run(config_name=command, task_function=guarded, overrides=fixed, with_log_configuration=True)
    except SystemExit:
        _clear(folder, existed)
        raise
    if raised:
        if isinstance(raised[0], UserError):
            _clear(folder, existed)
        raise raised[0]


def _clear(folder: Path, existed: bool) -> None:
    """Leave no folder of a run that had not begun."""
    if not existed and not (folder / "metrics.csv").exists() and not any(folder.glob("checkpoints/*")):
        shutil.rmtree(folder, ignore_errors=True)
