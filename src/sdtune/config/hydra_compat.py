"""All private names of Hydra and OmegaConf that sdtune uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log, run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.override_parser.types import Override

__all__ = [
    "Callbacks",
    "Hydra",
    "create_config_search_path",
    "full_key",
    "get_args_parser",
    "grid_of_jobs",
    "initialized",
    "option_names",
    "print_info",
    "run_composed",
]


@contextmanager
def initialized(command: str, search: ConfigSearchPath) -> Iterator[Hydra]:
    """Context manager: Hydra for the job name ``command`` and the search path ``search``.

    ``hydra.initialize`` does not accept a search path.
    """
    hydra = Hydra.create_main_hydra2(task_name=command, config_search_path=search)
    try:
        yield hydra
    finally:
        GlobalHydra.instance().clear()


def run_composed(hydra: Hydra, config: DictConfig, run_dir: str, work: Callable[[DictConfig], Any]) -> None:
    """Run ``work`` as a Hydra job with a composed ``config``; ``Hydra.run`` would compose it a second time.

    Hydra's listing of plugins and search path for ``hydra.verbose=true`` is left out; ``--info all`` prints it.

    Args:
        hydra: Hydra with the search path of ``config``.
        config: composed config with the node ``hydra``; changed in place.
        run_dir: override of ``hydra.run.dir``, which replaces the value in ``config``.
        work: receives ``config`` without the node ``hydra``. Hydra prints a line before its exception passes through.
    """
    folder = OverridesParser.create().parse_override(run_dir)
    config.hydra.run.dir = folder.value()
    config.hydra.overrides.hydra.append(run_dir)
    config.hydra.mode = RunMode.RUN
    name = config.hydra.job.config_name
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    callbacks = Callbacks(config)
    callbacks.on_run_start(config=config, config_name=name)
    result = run_job(
        work,
        config,
        job_dir_key="hydra.run.dir",
        job_subdir_key=None,
        hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=callbacks),
    )
    callbacks.on_run_end(config=config, config_name=name, job_return=result)
    _ = result.return_value  # raises the exception of a failed job


def grid_of_jobs(sweeper: type, overrides: list[Override]) -> list[list[str]] | None:
    """Overrides of each job that Hydra's basic sweeper creates from ``overrides``; None for any other ``sweeper``.

    The import is inside the function, because Hydra's plugin search reloads the module and replaces the class.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if not issubclass(sweeper, BasicSweeper):
        return None
    return [list(job) for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]


def full_key(node: DictConfig) -> str:
    """Dotted key of ``node`` in its config; empty for the top-level config."""
    return str(node._get_full_key(None) or "")


def option_names(parser: ArgumentParser) -> list[str]:
    """Names of all options of ``parser``, such as ``--multirun`` and ``-m``."""
    return [name for action in parser._actions for name in action.option_strings]


def print_info(arguments: Any, parser: Any, folder: str, config_name: str) -> None:
    """Run Hydra for ``--help``, ``--cfg``, ``--info`` and similar options, with the configs in ``folder``."""

    def task(config: DictConfig) -> None:
        """Never called: Hydra prints and returns."""

    task.__module__ = "sdtune"  # Hydra reads the program name from it
    _run_hydra(arguments, parser, task, folder, config_name)
