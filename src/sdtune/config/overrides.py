"""Overrides that sdtune reads before Hydra parses the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException

AUTO = "resume=auto"
"""Override that starts a run, or continues it if its folder has a checkpoint."""


def parsed(override: str) -> tuple[str, str]:
    """Key and value of an override: they are equal for ``a=b`` and ``a="b"``, which mean the same."""
    try:
        found = OverridesParser.create().parse_override(override)
        return found.key_or_group, repr(found.value())
    except HydraException:
        return override, ""


def resumed_folder(overrides: Sequence[str]) -> Path | None:
    """The folder of the last ``resume=`` override, plain or quoted for Hydra; None if no run is resumed."""
    return folder_override([text for text in overrides if text not in ("resume=null", AUTO)], "resume")


def folder_override(overrides: Sequence[str], key: str) -> Path | None:
    """The folder of the last override of ``key``, plain or quoted for Hydra; None if there is none."""
    last = next((text for text in reversed(overrides) if text.startswith(f"{key}=")), None)
    if last is None:
        return None
    unquoted = Path(last.removeprefix(f"{key}=")).expanduser()
    if unquoted.exists():
        return unquoted
    try:
        return Path(str(OverridesParser.create().parse_override(last).value())).expanduser()
    except OverrideParseException:
        return unquoted
