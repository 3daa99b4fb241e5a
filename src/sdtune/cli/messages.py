"""One-line messages for errors of Hydra and OmegaConf while a config is composed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from sdtune.config.hydra_compat import full_key
from sdtune.config.overrides import resumed_folder
from sdtune.quoting import shell_override
from sdtune.runs.compare import NOT_RESUMABLE_REMEDY
from sdtune.suggest import suggestion

_FOLDER_SETTINGS = ("data.path", "data.prompt", "data.trigger", "data.repeats", "data.hold_out", "data.validation_path")


def composition_error(error: Exception, typed: Sequence[str]) -> str:
    """One-line message for an error in the user's arguments ``typed`` or in the overrides of a resumed run."""
    line = _one_line(error, typed)
    resumed, key = resumed_folder(typed), re.split("[:=]", line)[0]
    if resumed is None or any(word.lstrip("+~").startswith(key) for word in typed):
        return line
    return f"{line}; {shell_override('resume', resumed)} repeats this override; {NOT_RESUMABLE_REMEDY}"


def _one_line(error: Exception, typed: Sequence[str]) -> str:
    for cause in _causes(error):
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
            return _unknown_setting(cause, typed)
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, name = cause.missing_cfg_file.rpartition("/")
            return f"{group}={name}: unknown option{suggestion(name, cause.options or ())}"
        if isinstance(cause, OverrideParseException):
            key, _, value = str(cause.override).partition("=")
            remedy = f"quote it for Hydra and the shell: {shell_override(key, value)}"
            return f"{key}: cannot parse {value}; {remedy}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:2])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _unknown_setting(error: ConfigAttributeError | ConfigKeyError, typed: Sequence[str]) -> str:
    known = str(error.full_key)  # ends at the first part that is unknown
    keys = (word.split("=", 1)[0].lstrip("+~") for word in typed)
    full = next((key for key in keys if key.startswith(f"{known}.")), known)
    if full in _FOLDER_SETTINGS:
        return f"{full}: not a setting of this data group; for your own images set data=folder"
    return f"{full}: unknown setting{_suggested_key(full, error.parent_node)}"


def _suggested_key(full: str, node: Any) -> str:
    """Suggestion for the first unknown part of ``full`` among the keys of ``node``."""
    if not isinstance(node, DictConfig):
        return ""
    known, parts = [str(key) for key in node], full.split(".")
    parent_key = full_key(node)
    depth = len(parent_key.split(".")) if parent_key else 0
    return suggestion(parts[min(depth, len(parts) - 1)], known)
