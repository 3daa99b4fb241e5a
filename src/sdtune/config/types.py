"""Descriptions of the valid values of a setting, derived from the annotation of its constructor argument."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

_NAMES = {"str": "text", "bool": "true or false", "Any": "", "Path": "path"}


def type_text(hint: Any, quote: str = "") -> str:
    """Description of the valid values, such as ``int >= 1 or null``; empty if the annotation is a class.

    Args:
        hint: annotation of the argument, with extras.
        quote: put around the values of a ``Literal``.
    """
    if hint is type(None):
        return "null"
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_text(args[0], quote) + ",".join(filter(None, map(_bound, args[1:])))
    if origin in (typing.Union, types.UnionType):
        texts = [type_text(arg, quote) for arg in args]
        return " or ".join(dict.fromkeys(texts)) if all(texts) else ""
    if origin is typing.Literal:
        return " or ".join(f"{quote}{arg}{quote}" for arg in args)
    if isinstance(origin, type) and issubclass(origin, Sequence | tuple):
        element = type_text(args[0], quote) if args else ""
        return f"list of {element}" if element else "list"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    name = getattr(hint, "__name__", "")
    return _NAMES.get(name, name if hint in (int, float) else "")


def element_hint(hint: Any) -> Any:
    """Annotation of the elements of a list that ``hint`` allows; None if it allows no list."""
    if get_origin(hint) in (typing.Union, types.UnionType, Annotated):
        return next((element for arg in get_args(hint) if (element := element_hint(arg)) is not None), None)
    origin = get_origin(hint)
    is_list = isinstance(origin, type) and issubclass(origin, Sequence | tuple)
    return get_args(hint)[0] if is_list and get_args(hint) else None


def _bound(limit: Any) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f" {sign} {getattr(limit, name)}" for name, sign in signs.items() if getattr(limit, name, None) is not None
    ]
    return ",".join(found)
