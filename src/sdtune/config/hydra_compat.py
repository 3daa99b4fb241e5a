"""The private names of Hydra and OmegaConf that sdtune uses, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

if TYPE_CHECKING:
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
    "print_info",
]


@contextmanager
def initialized(command: str, search: ConfigSearchPath) -> Iterator[Hydra]:
    """Hydra for the job name ``command`` and the configs in ``search``; ``hydra.initialize`` takes no search path."""
    hydra = Hydra.create_main_hydra2(task_name=command, config_search_path=search)
    try:
        yield hydra
    finally:
        GlobalHydra.instance().clear()


def grid_of_jobs(sweeper: type, overrides: list[Override]) -> list[list[str]] | None:
    """The overrides of each job that Hydra's basic sweeper makes of ``overrides``; None where ``sweeper`` is another.

    Imported here: Hydra's search for plugins reads the module anew, and its class is another then.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if not issubclass(sweeper, BasicSweeper):
        return None
    return [list(job) for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]


def full_key(node: DictConfig) -> str:
    """Where ``node`` stands in its config, as a dotted key; empty for the config itself."""
    return str(node._get_full_key(None) or "")


def print_info(arguments: Any, parser: Any, folder: str, config_name: str) -> None:
    """Answer ``--help``, ``--cfg``, ``--info`` and their like from the configs in ``folder``."""

    def task(config: DictConfig) -> None:
        """Never called: Hydra prints and returns."""

    task.__module__ = "sdtune"  # Hydra takes the program's name from it
    _run_hydra(arguments, parser, task, folder, config_name)
