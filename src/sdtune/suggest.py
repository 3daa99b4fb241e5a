"""Suggest the most similar valid name for a misspelled one."""

from __future__ import annotations

import difflib
from collections.abc import Collection

_MOST_NAMES = 12
"""Number of names in a message; the names of all recipes would fill the screen."""


def closest_match(name: str, known: Collection[str], cutoff: float = 0.6) -> str | None:
    """The most similar name of ``known``, ignoring case; None if no similarity (0 to 1) is at least ``cutoff``."""
    by_lower_case = {other.lower(): other for other in known}
    similar = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[similar[0]] if similar else None


def suggestion(name: str, known: Collection[str]) -> str:
    """``"; did you mean ...?"``, or the first known names if none is similar."""
    match = closest_match(name, known)
    if match is not None:
        return f"; did you mean {match}?"
    names = sorted(known)
    if not names:
        return ""
    return f"; available: {', '.join([*names[:_MOST_NAMES], *(['...'] if len(names) > _MOST_NAMES else [])])}"
