"""The private names of Hydra and OmegaConf that sdtune uses, and no others."""

from __future__ import annotations

from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_config_search_path, get_args_parser
from omegaconf import DictConfig

__all__ = [
    "BasicSweeper",
    "Callbacks",
    "Hydra",
    "create_config_search_path",
    "full_key",
    "get_args_parser",
    "print_info",
]


def full_key(node: DictConfig) -> str:
    """Where ``node`` stands in its config, as a dotted key; empty for the config itself."""
    return str(node._get_full_key(None) or "")


def print_info(arguments: Any, parser: Any, folder: str, config_name: str) -> None:
    """Answer ``--help``, ``--cfg``, ``--info`` and their like from the configs in ``folder``."""

    def task(config: DictConfig) -> None:
        """Never called: Hydra prints and returns."""

    task.__module__ = "sdtune"  # Hydra takes the program's name from it
    _run_hydra(arguments, parser, task, folder, config_name)
