"""Check a composed config against constructor signatures, in one pass.

Constructor signatures are the schema: types by annotation, ranges by ``Annotated``.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import SchemaError

from sdtune.config.targets import resolve
from sdtune.config.types import element_hint, type_text
from sdtune.errors import UserError
from sdtune.suggest import suggestion

_EXPECTED = {"int": "an integer", "float": "a number", "bool": "true or false", "string": "text"}
"""Expected values by the first part of pydantic's error type, where the annotation has classes of a library."""

_CONSTRAINTS = ("string_pattern_mismatch", "string_too_short", "string_too_long", "too_short", "too_long")
"""Error types of pydantic whose own text is shown; for all others, :func:`type_text` describes the expected type."""


def _mismatch(error: ValidationError, hint: Any, key: str, value: Any) -> UserError:
    """One-line error for the first mismatch: what was given, and the valid values or pydantic's reason."""
    first = error.errors()[0]
    value_key, node, node_hint = key, value, hint
    for part in first["loc"]:  # loc also contains pydantic's names of union branches
        child: Any = node.get(part) if isinstance(node, Mapping) else None
        is_element = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if is_element:
            child = node[part]
        if child is not None:
            value_key, node, node_hint = f"{value_key}.{part}", child, element_hint(node_hint) if is_element else None
    if first["type"] == "missing":
        name = first["loc"][-1]
        return UserError(f"{name} is missing", key=value_key, remedy=f"set {name}")
    expected = type_text(node_hint) or _EXPECTED.get(first["type"].partition("_")[0])
    if first["type"] in _CONSTRAINTS:
        expected = None
    if expected and expected.startswith("list of") and isinstance(node, int | float | str):
        expected += f", such as [{node}]"
    reason = f"expected {expected}" if expected else first["msg"][0].lower() + first["msg"][1:]
    return UserError(f"got {_shown(node)}", key=value_key, remedy=reason)


def check_node(node: Any, key: str = "", trust: Sequence[str] = (), given: Collection[str] = ()) -> None:
    """Check ``node`` against the signatures of its targets.

    Args:
        node: a plain container, resolved.
        key: its dotted key in the config, for messages.
        trust: additional packages that ``_target_`` may name.
        given: arguments that the command passes, so that the config must not set them.

    Raises:
        UserError: one line with the key, for the first mismatch.
    """
    if isinstance(node, Mapping):
        if node.get("_target_"):
            _check_call(node, key, trust, given)
        for name, value in node.items():
            check_node(value, f"{key}.{name}" if key else str(name), trust)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check_node(value, f"{key}[{index}]", trust)


def _check_call(node: Mapping[str, Any], key: str, trust: Sequence[str], given: Collection[str]) -> None:
    target = resolve(str(node["_target_"]), key, trust)
    function = target.__init__ if inspect.isclass(target) else target
    parameters = {n: p for n, p in inspect.signature(function).parameters.items() if n != "self"}
    # Annotations of a dataclass and its bases are resolved in the module of each class; __init__ has only the last one.
    annotated = target if dataclasses.is_dataclass(target) else function
    hints = get_type_hints(annotated, include_extras=True)
    names = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and n not in given]
    for name, value in node.items():
        if name.startswith("_") and name.endswith("_"):
            continue
        value_key = f"{key}.{name}"
        if name not in names:
            raise UserError(f"not a setting of {target.__name__}{suggestion(name, names)}", key=value_key)
        if value == "???":
            raise _missing(value_key, hints.get(name))
        if name in hints:
            _check_argument(value, hints[name], value_key)
    if node.get("_partial_"):
        return
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in node and name not in ("args", "kwargs"):
            raise _missing(f"{key}.{name}", hints.get(name))


def _check_argument(value: Any, hint: Any, key: str) -> None:
    """Check one argument of a node; where an object is expected, a config has a node with ``_target_``."""
    expected = type_text(hint)
    if _holds_target(value):
        # The annotations of lists and mappings do not state whether their entries are objects.
        if expected and not re.search(r"\b(list|mapping)(?! of (text|int|float|true))", expected):
            raise UserError("got a node with _target_", key=key, remedy=f"expected {expected}")
    elif value is not None and not isinstance(value, Mapping) and _only_own_classes(hint):
        raise UserError(f"got {_shown(value)}", key=key, remedy="expected a node with _target_")
    else:
        check_value(value, hint, key)


def _only_own_classes(hint: Any) -> bool:
    """Whether ``hint`` is a class of sdtune, or a union of such classes and None."""
    is_union = get_origin(hint) in (Annotated, Union, UnionType)
    kinds = [kind for kind in (get_args(hint) if is_union else (hint,)) if kind is not type(None)]
    return all(inspect.isclass(kind) and kind.__module__.startswith("sdtune.") for kind in kinds)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _missing(key: str, hint: Any) -> UserError:
    expected = type_text(hint)
    return UserError("missing value", key=key, remedy=f"set {key}=VALUE{f' ({expected})' if expected else ''}")


def _holds_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(_holds_target(v) for v in value.values())
    return isinstance(value, list) and any(_holds_target(v) for v in value)


_NO_SCHEMA = (PydanticSchemaGenerationError, PydanticUserError, SchemaError)


def check_value(value: Any, hint: Any, key: str) -> None:
    """Check that ``value`` fits the annotation ``hint``.

    Raises:
        UserError: it does not; the message names ``key``.
    """
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except _NO_SCHEMA:
        try:
            adapter = TypeAdapter(hint)
        except _NO_SCHEMA:
            return  # a class of another library; its constructor checks the value
    try:
        # Strict for single values, because the constructor gets the value without pydantic's conversion.
        adapter.validate_python(value, strict=not isinstance(value, list | dict))
    except ValidationError as error:
        raise _mismatch(error, hint, key, value) from error
