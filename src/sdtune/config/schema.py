"""Check a composed config against constructor signatures, in one pass.

Constructor signatures are the schema: types by annotation, ranges by ``Annotated``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from sdtune.config.targets import resolve
from sdtune.errors import UserError
from sdtune.suggest import suggestion


def _message(error: ValidationError, key: str, value: Any) -> str:
    first = error.errors()[0]
    value_key, node = key, value
    for part in first["loc"]:  # loc also contains pydantic's names of union branches
        child: Any = node.get(part) if isinstance(node, Mapping) else None
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            child = node[part]
        if child is not None:
            value_key, node = f"{value_key}.{part}", child
    reason = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "missing":
        reason = f"{first['loc'][-1]} is missing"
    return f"{value_key}: {value!r}: {reason}"


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
            raise UserError("missing value", key=value_key, remedy=f"set {value_key}=VALUE")
        if not _holds_target(value) and name in hints:
            check_value(value, hints[name], value_key)
    if node.get("_partial_"):
        return
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in node and name not in ("args", "kwargs"):
            raise UserError("missing value", key=f"{key}.{name}", remedy=f"set {key}.{name}=VALUE")


def _holds_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(_holds_target(v) for v in value.values())
    return isinstance(value, list) and any(_holds_target(v) for v in value)


def check_value(value: Any, hint: Any, key: str) -> None:
    """Check that ``value`` fits the annotation ``hint``.

    Raises:
        UserError: it does not; the message names ``key``.
    """
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError):
        try:
            adapter = TypeAdapter(hint)
        except (PydanticSchemaGenerationError, PydanticUserError):
            return  # a class of another library; its constructor checks the value
    try:
        # Strict for single values, because the constructor gets the value without pydantic's conversion.
        adapter.validate_python(value, strict=not isinstance(value, list | dict))
    except ValidationError as error:
        raise UserError(_message(error, key, value)) from error
