"""Compose a config from overrides with Hydra; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdtune.config.hydra_compat import create_config_search_path, initialized
from sdtune.errors import UserError
from sdtune.paths import command_line_folder, config_folder
from sdtune.quoting import shell_override, shell_word
from sdtune.runs.hydra_values import unresolved

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.override_parser.types import Override

Prepare = Callable[[DictConfig, Path], Callable[[DictConfig], Any]]
"""Function that checks a composed config and its output folder and returns the function to run; loads no weights."""

WITHOUT_SWEEPS = ("plan", "caption", "mask")
"""Commands that write no folder of their own and support no sweeps."""


def search_path(extra: str | None) -> ConfigSearchPath:
    """Hydra's search path: ``extra``, the ``--config-dir``, and then the config folder of sdtune.

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
    """Compose ``conf/<command>.yaml`` with ``overrides``, including the node ``hydra``; Hydra's errors pass through.

    Raises:
        UserError: an override has several values, which only a sweep may have, or the index of a list is not a number.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    if any(override.is_sweep_override() for override in parsed):
        _refuse_sweep(command, search, parsed)
    with initialized(command, search):
        try:
            config: DictConfig = hydra.compose(command, overrides, return_hydra_config=True)
        except (ValueError, TypeError) as error:
            if isinstance(error, OmegaConfBaseException):
                raise
            # OmegaConf converts the name below a list to an index: optimizer.betas.foo=1. Hydra fails for data=[[]].
            raise UserError(
                f"{' '.join(overrides)}: cannot be composed ({error})", remedy="check these overrides"
            ) from error
    return config


def _refuse_sweep(command: str, search: ConfigSearchPath, overrides: list[Override]) -> NoReturn:
    """Raise UserError for the first override with several values."""
    override = next(override for override in overrides if override.is_sweep_override())
    key, _, value = str(override.input_line).partition("=")
    default = None
    with suppress(HydraException, OmegaConfBaseException, UserError):  # other overrides may depend on this one
        config = compose(command, search, [str(o.input_line) for o in overrides if not o.is_sweep_override()])
        default = OmegaConf.select(config, key, throw_on_missing=False)
    remedies = [] if command in WITHOUT_SWEEPS else ["add -m for a sweep"]
    is_text = " " in value
    if is_text:
        remedies.append(f"quote the value if it is one text: {shell_override(key, value)}")
    is_number = re.fullmatch(r"[\d.,eE+-]+", value) is not None
    if OmegaConf.is_list(default) or key == "strengths" or (default is None and not is_number):
        remedies.append("write a list: " + shell_word(f'{key}=["..."]') if is_text else f"write a list: [{value}]")
    raise UserError(f"several values ({value})", key=key, remedy=" or ".join(remedies) or "set one value")


def recompose(config: DictConfig, group: str, option: str) -> DictConfig:
    """Compose the command line of ``config`` again with ``option`` for ``group``."""
    overrides = [o for o in unresolved(config.hydra.overrides.task) if not o.startswith(f"{group}=")]
    return compose(config.hydra.job.name, search_path(_user_config_folder(config)), [*overrides, f"{group}={option}"])


def choices(config: DictConfig, group: str) -> list[str]:
    """The options of the config group ``group``, including those in the ``--config-dir`` of the command line."""
    folders = [config_folder(), *([Path(user_folder)] if (user_folder := _user_config_folder(config)) else [])]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def _user_config_folder(config: DictConfig) -> str | None:
    return command_line_folder(config.hydra.runtime.config_sources)


def run_folder(config: DictConfig) -> Path:
    """Output folder of the run of a composed ``config`` (including the node ``hydra``)."""
    return Path(str(config.hydra.run.dir)).expanduser()


def check_folder_name(folder: Path, key: str) -> None:
    """Raise UserError, which names the setting ``key``, if Hydra would interpolate a part of the name of ``folder``."""
    if "${" in str(folder):
        raise UserError(f"{folder} contains ${{, which Hydra interpolates", key=key, remedy="choose another folder")


def without_hydra(whole: DictConfig) -> DictConfig:
    """Copy of a composed config without the node ``hydra``."""
    return OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
