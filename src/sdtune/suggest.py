"""Suggest the most similar valid name for a misspelled one."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def closest_match(name: str, known: Collection[str]) -> str | None:
    """The most similar name of ``known``; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def suggestion(name: str, known: Collection[str]) -> str:
    """``"; did you mean ...?"``, or the list of the known names if none is similar."""
    match = closest_match(name, known)
    if match is not None:
        return f"; did you mean {match}?"
    return f"; available: {', '.join(sorted(known))}" if known else ""
