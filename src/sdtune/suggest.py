"""Suggest the most similar valid name for a misspelled one."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def suggestion(name: str, known: Collection[str]) -> str:
    """``"; did you mean ...?"``, or the list of the known names if none is similar."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; available: {', '.join(sorted(known))}" if known else ""
