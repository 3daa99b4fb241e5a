"""Compose a command line's overrides into a config with Hydra; imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sdtune.config.hydra_compat import Hydra, create_config_search_path
from sdtune.paths import command_line_folder, config_folder

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

Prepare = Callable[[DictConfig, Path], Callable[[DictConfig], Any]]
"""Checks a composed config and the folder it is to write to, and gives the function that runs it; loads no weights."""


def search_path(extra: str | None) -> ConfigSearchPath:
    """Where configs are looked for: in sdtune's own folder, and before it in ``extra``, the ``--config-dir``.

    Raises:
        ValueError: ``extra`` is not a folder.
    """
    search = create_config_search_path(str(config_folder()))
    if extra is not None:
        folder = Path(extra).absolute()
        if not folder.is_dir():
            raise ValueError(f"--config-dir: {extra} is not a folder")
        search.prepend(provider="command-line", path=f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    return search


def compose(command: str, search: ConfigSearchPath, overrides: list[str]) -> DictConfig:
    """The config ``conf/<command>.yaml`` under ``overrides``, Hydra's own part included; raises as Hydra does."""
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
    return compose(config.hydra.job.name, search_path(_own_folder(config)), [*overrides, f"{group}={option}"])


def choices(config: DictConfig, group: str) -> list[str]:
    """The options of ``group``, those of the command line's ``--config-dir`` too."""
    folders = [config_folder(), *([Path(own)] if (own := _own_folder(config)) else [])]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def _own_folder(config: DictConfig) -> str | None:
    return command_line_folder(config.hydra.runtime.config_sources)


def run_folder(config: DictConfig) -> Path:
    """Where the run of a composed ``config`` (Hydra's own part included) writes."""
    return Path(str(config.hydra.run.dir)).expanduser()


def without_hydra(whole: DictConfig) -> DictConfig:
    """A job's config without Hydra's part."""
    return OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
