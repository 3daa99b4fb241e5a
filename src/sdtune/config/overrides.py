"""Overrides that sdtune itself reads, before Hydra does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException


def resumed_folder(overrides: Sequence[str]) -> Path | None:
    """The folder that the last ``resume=`` names, plainly or quoted for Hydra; None where nothing is resumed."""
    given = [text for text in overrides if text.startswith("resume=") and text != "resume=null"]
    if not given:
        return None
    plain = Path(given[-1].removeprefix("resume=")).expanduser()
    if plain.exists():
        return plain
    try:
        return Path(str(OverridesParser.create().parse_override(given[-1]).value())).expanduser()
    except OverrideParseException:
        return plain
