"""The private names of Hydra and OmegaConf that sdtune uses, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

__all__ = [
    "BasicSweeper",
    "Callbacks",
    "Hydra",
    "create_config_search_path",
    "full_key",
    "get_args_parser",
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


def full_key(node: DictConfig) -> str:
    """Where ``node`` stands in its config, as a dotted key; empty for the config itself."""
    return str(node._get_full_key(None) or "")


def print_info(arguments: Any, parser: Any, folder: str, config_name: str) -> None:
    """Answer ``--help``, ``--cfg``, ``--info`` and their like from the configs in ``folder``."""

    def task(config: DictConfig) -> None:
        """Never called: Hydra prints and returns."""

    task.__module__ = "sdtune"  # Hydra takes the program's name from it
    _run_hydra(arguments, parser, task, folder, config_name)
