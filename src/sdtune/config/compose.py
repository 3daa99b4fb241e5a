"""Compose a command line's overrides into a config with Hydra; imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from sdtune.config.hydra_compat import create_config_search_path, initialized
from sdtune.errors import UserError
from sdtune.paths import command_line_folder, config_folder
from sdtune.quoting import shell_override

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.override_parser.types import Override

Prepare = Callable[[DictConfig, Path], Callable[[DictConfig], Any]]
"""Checks a composed config and the folder it is to write to, and gives the function that runs it; loads no weights."""


def search_path(extra: str | None) -> ConfigSearchPath:
    """Where configs are looked for: in sdtune's own folder, and before it in ``extra``, the ``--config-dir``.

    Raises:
        UserError: ``extra`` is not a folder.
    """
    search = create_config_search_path(str(config_folder()))
    if extra is not None:
        folder = Path(extra).absolute()
        if not folder.is_dir():
            raise UserError(f"{extra} is not a folder", key="--config-dir")
        search.prepend(provider="command-line", path=f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    return search


def compose(command: str, search: ConfigSearchPath, overrides: list[str]) -> DictConfig:
    """The config ``conf/<command>.yaml`` under ``overrides``, Hydra's own part included; raises as Hydra does.

    Raises:
        UserError: an override has several values, which only a sweep can have.
    """
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_sweep_override():
            _refuse_several_values(override)
    with initialized(command, search):
        config: DictConfig = hydra.compose(command, overrides, return_hydra_config=True)
    return config


def _refuse_several_values(override: Override) -> None:
    key, _, value = str(override.input_line).partition("=")
    text = f", quote it for one text: {shell_override(key, value)}" if " " in value else ""
    raise UserError(
        f"{value} are several values", key=key, remedy=f"add -m for a run of each{text}, or write a list: [{value}]"
    )


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
