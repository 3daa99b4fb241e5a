"""Overrides as people type them: texts without Hydra's quotes, lists without brackets, settings without their group."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from sdtune.errors import UserError
from sdtune.quoting import in_quotes, override, shell_word

_TEXTS = ("prompt", "data.prompt", "data.class_prompt", "data.trigger", "sampling.negative_prompt")
"""Settings whose value is a text, or a list of texts in brackets."""

_LISTS = {"sample": ("seeds", "strengths"), "plan": ("methods",)}
"""Settings of a command that are lists of numbers or names."""

_SAMPLING = ("steps", "guidance", "negative_prompt", "sampler", "width", "height", "batch_size")
"""Settings of the group ``sampling``, which ``sdtune sample`` takes without the name of the group."""


def for_hydra(command: str, argv: Sequence[str]) -> list[str]:
    """``argv`` with its overrides in Hydra's grammar.

    A text may contain the special characters of Hydra, such as commas. With ``-m``, a comma separates the values of a
    sweep instead.

    Raises:
        UserError: a range of seeds is empty, or a comma could belong to a text or to a sweep.
    """
    multirun = any(text in ("-m", "--multirun") for text in argv)
    return [_for_hydra(command, text, multirun) for text in argv]


def _for_hydra(command: str, text: str, multirun: bool) -> str:
    key, equals, value = text.partition("=")
    if not equals or not value:
        return text
    if command == "sample" and key in _SAMPLING:
        key = f"sampling.{key}"
    if key in _TEXTS:
        return _text(key, value, multirun)
    if key in _LISTS.get(command, ()) and not (multirun and "," in value):
        return f"{key}={_list(key, value)}"
    return f"{key}={value}"


def _text(key: str, value: str, multirun: bool) -> str:
    """Override of ``key`` by a text, which is put in quotes where Hydra would read another value."""
    if value.startswith("[") or (len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"):
        return f"{key}={value}"
    if multirun and "," in value:
        if re.fullmatch(r"[^\"']*,\s[^\"']*", value):
            raise _ambiguous(key, value)
        return f"{key}={value}"
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
        is_text = not parsed.is_sweep_override() and isinstance(parsed.value(), str | None)
    except HydraException:
        is_text = False
    return f"{key}={value}" if is_text else override(key, value)


def _ambiguous(key: str, value: str) -> UserError:
    """Error for a ``value`` that can be one text with a comma, or several texts of a sweep."""
    one = shell_word(f"{key}={in_quotes(value)}")
    several = shell_word(f"{key}={','.join(in_quotes(part.strip()) for part in value.split(','))}")
    return UserError(
        "with -m, a comma separates the values of a sweep",
        key=key,
        remedy=f"for one text write {one}, for several {several}",
    )


def _list(key: str, value: str) -> str:
    """``value`` in brackets; a range of seeds ``0-3`` becomes its numbers."""
    if value.startswith("[") or value in ("null", "all"):
        return value
    return f"[{','.join(_range(key, part.strip()) for part in value.split(','))}]"


def _range(key: str, part: str) -> str:
    match = re.fullmatch(r"(\d+)-(\d+)", part)
    if match is None:
        return part
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise UserError(f"{part} is empty", key=key, remedy=f"write {key}={last}-{first}")
    return ",".join(map(str, range(first, last + 1)))
