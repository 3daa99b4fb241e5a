"""Overrides as people type them: texts without Hydra's quotes, lists without brackets, settings without their group."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from sdtune.errors import UserError
from sdtune.quoting import in_quotes, override, shell_word

_TEXTS = ("prompt", "data.prompt", "data.class_prompt", "data.trigger", "sampling.negative_prompt", "prefix")
"""Settings whose value is a text, or a list of texts in brackets."""

_TEXT_OF_SOURCE = r"\+\+data\.sources\.[\w-]+\.(prompt|class_prompt|trigger)"

_LISTS = {"sample": ("seeds", "strengths"), "plan": ("methods",), "caption": ("undesired_tags",), "mask": ("words",)}
"""Command -> its settings that are lists of numbers or names."""

_SAMPLING = ("steps", "guidance", "negative_prompt", "sampler", "width", "height", "batch_size", "skip_guidance_layers")
"""Settings of the group ``sampling``, which ``sdtune sample`` takes without the name of the group."""


_MOST_SEEDS = 10_000


def for_hydra(command: str, argv: Sequence[str]) -> list[str]:
    """``argv`` with its overrides in Hydra's grammar.

    A text is taken literally, with all special characters of Hydra; lists in brackets, texts in Hydra's quotes and
    ``null`` are left to Hydra. With ``-m``, a comma separates the values of a sweep instead.

    Raises:
        UserError: a range of seeds is empty or too long, or a comma could belong to a text or to a sweep.
    """
    multirun = any(text in ("-m", "--multirun") for text in argv)
    return [_for_hydra(command, text, multirun) for text in argv]


def _for_hydra(command: str, text: str, multirun: bool) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        return text
    if re.match(r"data\.sources(\.|$)", key):  # Hydra adds unknown keys, such as names of sources, only with ++
        key = f"++{key}"
    if command == "sample" and key in _SAMPLING:
        key = f"sampling.{key}"
    if value and (key in _TEXTS or re.fullmatch(_TEXT_OF_SOURCE, key)):
        return _text(key, value, multirun)
    if value and key in _LISTS.get(command, ()):
        return f"{key}={_list(key, value, multirun)}"
    return f"{key}={value}"


def _text(key: str, value: str, multirun: bool) -> str:
    """Override of ``key`` by a text, which is put in quotes where Hydra would read another value."""
    is_list = value.startswith("[") and value.endswith("]")
    if value == "null" or is_list or _is_one_quoted_text(f"{key}={value}"):
        return f"{key}={value}"
    if multirun and "," in value:
        if re.fullmatch(r"[^\"']*,\s[^\"']*", value):
            raise _ambiguous(key, value)
        return f"{key}={value}"
    return override(key, value)


def _is_one_quoted_text(text: str) -> bool:
    try:
        parsed = OverridesParser.create().parse_override(text)
    except HydraException:
        return False
    return not parsed.is_sweep_override() and isinstance(parsed.value(), str) and text.endswith(("'", '"'))


def _ambiguous(key: str, value: str) -> UserError:
    """Error for a ``value`` with a comma: it may be one text, or several values of a sweep."""
    one = shell_word(f"{key}={in_quotes(value)}")
    several = shell_word(f"{key}={','.join(in_quotes(part.strip()) for part in value.split(','))}")
    return UserError(
        "with -m, a comma separates the values of a sweep",
        key=key,
        remedy=f"for one text write {one}, for several {several}",
    )


def _list(key: str, value: str, multirun: bool) -> str:
    """``value`` in brackets, or with ``multirun`` each of its parts; a range of seeds ``0-3`` becomes its numbers."""
    if not re.fullmatch(r"[\w.+-]+(,[\w.+-]+)*", value) or value in ("null", "all"):
        return value
    parts = [_range(key, part) for part in value.split(",")]
    return ",".join(f"[{part}]" for part in parts) if multirun else f"[{','.join(parts)}]"


def _range(key: str, part: str) -> str:
    match = re.fullmatch(r"(\d+)-(\d+)", part)
    if match is None:
        return part
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise UserError(f"{part} is empty", key=key, remedy=f"write {key}={last}-{first}")
    if last - first >= _MOST_SEEDS:
        raise UserError(f"{part} has {last - first + 1:,} numbers", key=key, remedy=f"set at most {_MOST_SEEDS:,}")
    return ",".join(map(str, range(first, last + 1)))
