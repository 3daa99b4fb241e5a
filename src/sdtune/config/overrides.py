"""Overrides that sdtune reads before Hydra parses the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException


def resumed_folder(overrides: Sequence[str]) -> Path | None:
    """The folder of the last ``resume=`` override, plain or quoted for Hydra; None if no run is resumed."""
    resume_overrides = [text for text in overrides if text.startswith("resume=") and text != "resume=null"]
    if not resume_overrides:
        return None
    unquoted = Path(resume_overrides[-1].removeprefix("resume=")).expanduser()
    if unquoted.exists():
        return unquoted
    try:
        return Path(str(OverridesParser.create().parse_override(resume_overrides[-1]).value())).expanduser()
    except OverrideParseException:
        return unquoted
