"""One-line messages for Hydra's and OmegaConf's errors."""

from __future__ import annotations

import re
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from sdtune.config.hydra_compat import full_key
from sdtune.suggest import suggestion

_OF_FOLDERS = ("data.path", "data.prompt", "data.trigger", "data.repeats", "data.hold_out", "data.validation_path")


def one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's messages run over several lines; the first two say what is wrong."""
    text = str(error)
    if several := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", text):
        return (
            f"{several[1]}: {several[2]} are several values; add -m for a run of each, or write a list: [{several[2]}]"
        )
    unknown = re.search(r"Key '([^']+)' is not in struct.*?full_key: (\S+)", text, re.DOTALL)
    if unknown or "Could not override" in text:
        full = unknown.group(2) if unknown else re.findall(r"'([^']+)'", text)[0]
        if full in _OF_FOLDERS:
            return f"{full}: there is no such setting here; images of your own need data=folder"
        return f"{full}: there is no such setting{_close(full, error)}"
    choice = re.search(r"Could not find '([^']+)'(.*)", text, re.DOTALL)
    if choice:
        group, _, name = choice.group(1).rpartition("/")
        options = re.findall(r"^\t(\S+)$", choice.group(2), re.MULTILINE)
        return f"{group}={name}: there is no such choice{suggestion(name, options)}"
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        quoted = value.replace('"', r"\"")
        return f"{key}: {value} cannot be read as it stands; quote it for Hydra and for the shell: '{key}=\"{quoted}\"'"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[:2])


def _close(full: str, error: Exception) -> str:
    """Where the first unknown part of the key stands, and what was probably meant."""
    node: Any = None
    at: BaseException | None = error
    while at is not None and not isinstance(node, DictConfig):
        node, at = getattr(at, "parent_node", None), at.__cause__
    if not isinstance(node, DictConfig):
        return ""
    known, parts = [str(key) for key in node], full.split(".")
    place = full_key(node)
    depth = len(place.split(".")) if place else 0
    return suggestion(parts[min(depth, len(parts) - 1)], known)
