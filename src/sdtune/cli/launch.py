"""Run a command: compose the config, check it, run it. Invalid input exits with one line, before a folder is created.

Imports no torch, so that ``--help``, ``--cfg`` and the error for a misspelled key appear immediately.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import os
import re
import shutil
import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sdtune.cli.as_typed import for_hydra
from sdtune.cli.exit_codes import exit_codes, refuse
from sdtune.cli.help import print_help
from sdtune.cli.main_setting import with_main_setting
from sdtune.cli.messages import check_option_names, composition_error
from sdtune.config.compose import Prepare, check_folder_name, compose, run_folder, search_path
from sdtune.config.hydra_compat import get_args_parser, initialized, option_names, print_info, run_composed
from sdtune.errors import UserError
from sdtune.files import locked
from sdtune.hardware import threads as _threads  # noqa: F401 - measures the CPU usage from its import on
from sdtune.hardware.processes import is_global_zero, is_launched_again, is_torchrun, launched_processes
from sdtune.hardware.signals import STOP_SIGNALS, handled, stop_before_start
from sdtune.log_filters import quiet, quiet_libraries
from sdtune.paths import config_folder
from sdtune.progress import is_shown, phase
from sdtune.quoting import override
from sdtune.runs.hydra_values import as_current
from sdtune.sweeps.sweep import multirun

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

_NOT_SECRET = ("data.", "new_tokens", "backbone.max_tokens", "backbone.t5_tokens", "keep_tokens", "max_new_tokens")
"""Words of a prompt, numbers of tokens, and an option of kohya's scripts."""
_SECRET = re.compile(r"(^|[._])(api_?key|token|password|secret)s?$", re.IGNORECASE)


def lazy_command(module: str) -> Prepare:
    """The ``prepare`` function of ``module``, imported when it is called, so that ``--help`` needs no torch."""

    def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
        quiet()
        work = sys.modules.get(module) or _imported(module)  # no full collection for each job of a sweep
        quiet_libraries()
        run: Callable[[DictConfig], Any] = work.prepare(config, folder)
        return run

    return prepare


def _imported(module: str) -> ModuleType:
    with gc_disabled(), phase("Starting") if is_shown() else contextlib.nullcontext():
        return importlib.import_module(module)


@contextlib.contextmanager
def gc_disabled() -> Iterator[None]:
    """Context manager for imports: disables the garbage collector, then excludes all objects from later collections.

    The libraries create half a million objects. A collection over them takes a quarter of a second and would run many
    times during a start.
    """
    module_count, enabled = len(sys.modules), gc.isenabled()
    gc.collect()  # gc.freeze() would also keep garbage permanently
    gc.disable()
    try:
        yield
        if len(sys.modules) > module_count:
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
    """Run ``command`` with the arguments ``argv``; an error ends the process as in :func:`exit_codes`.

    Args:
        command: name of the top-level config, ``conf/<command>.yaml``.
        argv: Hydra's options and overrides.
        prepare: see :data:`Prepare`.
        rewrite: transforms the arguments before Hydra parses them.
        writes: whether the command writes a folder; if not, it does not run as a Hydra job.
    """
    with exit_codes(command, partial(composition_error, command=command, typed=argv)):
        parser = get_args_parser()
        check_option_names(argv, command, option_names(parser))
        check_hydra_settings(argv)
        args = _parse(command, parser, rewrite(for_hydra(command, _with_quoted_folder(argv))))
        if args.multirun and args.cfg:
            refuse("--cfg: shows the config of one job; remove -m and set one value for each key of the sweep")
        args.overrides = with_main_setting(command, args.overrides)
        check_secrets(args.overrides)
        if args.help:
            print_help(command, search_path(args.config_dir), args.overrides)
            return
        if args.hydra_help or args.cfg or args.info is not None:
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
        job = checked_job(command, search, args.overrides, prepare, writes=writes)
    with exit_codes(command):
        if writes:
            run_job(job)
        else:
            job.work(job.config)


@dataclass(frozen=True)
class CheckedJob:
    """A command whose config is composed and checked.

    Attributes:
        search: Hydra's search path.
        config: composed config with the node ``hydra``.
        folder: output folder.
        existed: whether the folder existed before the command, and is therefore not removed.
        work: receives the config without the node ``hydra``.
    """

    search: ConfigSearchPath
    config: DictConfig
    folder: Path
    existed: bool
    work: Callable[[DictConfig], Any]


def checked_job(
    command: str, search: ConfigSearchPath, overrides: list[str], prepare: Prepare, *, writes: bool = True
) -> CheckedJob:
    """Compose the config of ``command``, check it and its folder, and create the folder if its name is the default.

    Raises:
        UserError: a setting is wrong; errors of Hydra and OmegaConf pass through.
    """
    config = compose(command, search, overrides)
    _check_mode(config)
    with as_current(config):
        folder = run_folder(config)
    if writes:
        _check_folder(command, folder, overrides, config)
    is_default = not any(text.startswith("hydra.run.dir=") for text in overrides)
    existed = folder.exists() and not is_default
    claimed = _claimed(folder) if writes and is_default else contextlib.nullcontext(folder)
    with claimed as folder, as_current(config, folder), handled(STOP_SIGNALS, stop_before_start):
        return CheckedJob(search, config, folder, existed, prepare(config, folder))


def _with_quoted_folder(argv: list[str]) -> list[str]:
    """``argv``, with the run folder quoted for Hydra if Lightning has put it between plain quotes.

    Lightning's launcher appends ``hydra.run.dir="FOLDER"`` to the command line of each additional process.
    """
    prefix = 'hydra.run.dir="'
    index = max((position for position, text in enumerate(argv) if text.startswith(prefix)), default=None)
    if index is None or not is_launched_again():
        return argv
    folder = argv[index].removeprefix(prefix).removesuffix('"')
    return [*argv[:index], override("hydra.run.dir", folder), *argv[index + 1 :]]


_HYDRA_SETTINGS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.launcher", "hydra.sweeper", "hydra.verbose")


def check_hydra_settings(argv: list[str]) -> None:
    """Refuse settings of Hydra that would move the files of a run, such as ``hydra.output_subdir=null``."""
    for text in argv:
        key = text.split("=")[0].lstrip("+~")
        is_supported = key.startswith(_HYDRA_SETTINGS) or key in ("hydra/launcher", "hydra/sweeper")
        if key.startswith(("hydra.", "hydra/")) and not is_supported and not is_launched_again():
            raise UserError(
                "setting of Hydra that sdtune does not support", key=key, remedy=f"use {', '.join(_HYDRA_SETTINGS)}"
            )


def _parse(command: str, parser: ArgumentParser, argv: list[str]) -> Namespace:
    parser.exit_on_error = False  # argparse would print usage lines
    try:
        args, extra = parser.parse_known_args(argv)
    except ArgumentError as error:
        refuse(f"{error.argument_name}: {error.message}; sdtune {command} --help lists the options")
    args.overrides += extra  # overrides that follow an option
    return args


def check_secrets(overrides: list[str]) -> None:
    """Refuse secrets on the command line."""
    for text in overrides:
        key = text.split("=", 1)[0].lstrip("+~")
        if _SECRET.search(key) and not key.startswith(_NOT_SECRET):
            raise UserError(
                "a command line is stored in logs and in .hydra/",
                key=key,
                remedy="set secrets as environment variables only",
            )


def _check_options(command: str, args: Namespace, writes: bool) -> None:
    """Refuse Hydra options that sdtune does not support."""
    for option, value in (
        ("-cn", args.config_name),
        ("-cp", args.config_path),
        ("--experimental-rerun", args.experimental_rerun),
    ):
        if value:
            refuse(f"{option}: not supported; select a recipe with -cd DIR experiment={value}")
    if args.multirun and not writes:
        refuse(f"--multirun: sdtune {command} supports no sweeps; remove --multirun")
    if args.multirun and is_torchrun():
        refuse("--multirun: torchrun would run the full sweep in every process; use hardware.devices=N instead")


def _check_mode(config: DictConfig) -> None:
    if config.hydra.mode not in (None, RunMode.RUN):
        raise UserError(
            f"got {config.hydra.mode.name}", key="hydra.mode", remedy="remove it from the recipe; -m starts a sweep"
        )


def _check_folder(command: str, folder: Path, overrides: list[str], config: DictConfig) -> None:
    nodes = OmegaConf.select(config, "hardware.num_nodes", default=1)
    several = command == "train" and (launched_processes() > 1 or "NODE_RANK" in os.environ or nodes != 1)
    if several and not any(text.startswith("hydra.run.dir=") for text in overrides):
        # Each process composes its own config, and the time in the default folder name may differ.
        raise UserError(
            "required for several processes, the same for all",
            key="hydra.run.dir",
            remedy="set hydra.run.dir=DIR",
        )
    check_folder_name(folder, "hydra.run.dir")
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"cannot create {folder}: {parent} is not a writable folder",
            key="hydra.run.dir",
            remedy="set hydra.run.dir=DIR",
        )


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[Path]:
    """Context manager that creates ``folder``, or ``folder-2`` and so on if another process has created it.

    The default name is the time in seconds, and the tasks of a scheduler's array start in the same second. If the body
    raises an exception, the folder and its new parents are removed.
    """
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        try:
            folder.mkdir()
            break
        except FileExistsError:
            folder = folder.with_name(f"{folder.name if number == 2 else folder.name.rpartition('-')[0]}-{number}")
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):  # another process uses it
            for created in (folder, *new_parents):
                created.rmdir()
        raise


def run_job(job: CheckedJob) -> None:
    """Run ``job`` as a Hydra job in its folder; remove the folder if it raises UserError or SystemExit."""
    errors: list[Exception] = []

    def guarded(composed: DictConfig) -> Any:
        # Hydra would print additional lines about the job for an error that passes through it.
        try:
            return job.work(composed)
        except Exception as error:
            errors.append(error)
            return None

    # Set as an override, so that .hydra/hydra.yaml records the folder; the name of a default folder may end in -2.
    run_dir = override("hydra.run.dir", job.folder)
    try:
        with (
            locked(job.folder) if is_global_zero() else contextlib.nullcontext(),
            initialized(job.config.hydra.job.config_name, job.search) as hydra,
        ):
            run_composed(hydra, job.config, run_dir, guarded)
    except SystemExit:
        _remove_unstarted(job.folder, job.existed)
        raise
    if errors:
        if isinstance(errors[0], UserError):
            _remove_unstarted(job.folder, job.existed)
        raise errors[0]


def _remove_unstarted(folder: Path, existed: bool) -> None:
    """Remove the folder of a run that has not started training."""
    if not existed and not (folder / "metrics.csv").exists() and not any(folder.glob("checkpoints/*")):
        shutil.rmtree(folder, ignore_errors=True)
