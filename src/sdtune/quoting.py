"""Quote values for Hydra's override grammar and for a POSIX shell."""

from __future__ import annotations

import re
import shlex

_PLAIN = re.compile(r"(?!\.\d)[A-Za-z_/.][\w/.+@%-]*", re.ASCII)
"""Text that Hydra parses as a string without quotes."""

_WORDS = ("null", "true", "false", "nan", "inf")
"""Words that Hydra parses as another type than a string."""


def quoted(value: object) -> str:
    """``value`` for Hydra's override grammar, in quotes only if needed."""
    if isinstance(value, bool | int | float):
        return str(value).lower()
    text = str(value)
    return text if _is_plain(text) else in_quotes(text)


def in_quotes(value: object) -> str:
    """``value`` in double quotes, for Hydra.

    Source: Hydra's documentation, "Basic override syntax", quoted values: a backslash is an escape only before a quote
    or at the end. ``${`` is escaped, because OmegaConf interpolates it within quotes too.
    """
    escaped = re.sub(
        r'(\\*)("|\$\{|\Z)', lambda match: match[1] * 2 + (f"\\{match[2]}" if match[2] else ""), str(value)
    )
    return f'"{escaped}"'


def override(key: str, value: object) -> str:
    """``KEY=VALUE`` for Hydra."""
    return f"{key}={quoted(value)}"


def shell_override(key: str, value: object) -> str:
    """``KEY=VALUE`` for Hydra, as one word of a POSIX shell, to copy and paste."""
    return shell_word(override(key, value))


def shell_word(text: str) -> str:
    """``text`` as one word of a POSIX shell; more readable than :func:`shlex.quote` if it has an apostrophe."""
    if "'" not in text:
        return shlex.quote(text)
    return '"' + re.sub(r'(["\\$`])', r"\\\1", text) + '"'


def _is_plain(text: str) -> bool:
    return _PLAIN.fullmatch(text) is not None and text.lower() not in _WORDS
