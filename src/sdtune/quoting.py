"""Quote values for Hydra's override grammar and for a shell."""

from __future__ import annotations

import re
import shlex

_PLAIN = re.compile(r"(?!\.\d)[A-Za-z_/.][\w/.+@%-]*", re.ASCII)
"""What Hydra reads as it stands, as text."""

_WORDS = ("null", "true", "false", "nan", "inf")
"""What it reads as something else than text."""


def quoted(value: object) -> str:
    """``value`` as Hydra's grammar reads it back: text as it stands where that is enough, else in quotes."""
    if isinstance(value, bool | int | float):
        return str(value).lower()
    text = str(value)
    return text if _is_plain(text) else in_quotes(text)


def in_quotes(value: object) -> str:
    """``value`` in double quotes, for Hydra.

    Source: Hydra's documentation, "Basic override syntax", quoted values: a backslash is an escape only before a quote
    or at the end. ``${`` would be an interpolation of OmegaConf's in quotes too.
    """
    escaped = re.sub(
        r'(\\*)("|\$\{|\Z)', lambda found: found[1] * 2 + (f"\\{found[2]}" if found[2] else ""), str(value)
    )
    return f'"{escaped}"'


def override(key: str, value: object) -> str:
    """``KEY=VALUE`` for Hydra."""
    return f"{key}={quoted(value)}"


def shell_override(key: str, value: object) -> str:
    """``KEY=VALUE`` for Hydra, as one word of a POSIX shell: what a user can paste."""
    return shell_word(override(key, value))


def shell_word(text: str) -> str:
    """``text`` as one word of a POSIX shell; more readable than :func:`shlex.quote` where it holds an apostrophe."""
    if "'" not in text:
        return shlex.quote(text)
    return '"' + re.sub(r'(["\\$`])', r"\\\1", text) + '"'


def _is_plain(text: str) -> bool:
    return _PLAIN.fullmatch(text) is not None and text.lower() not in _WORDS
