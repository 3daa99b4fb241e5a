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


def _say(error: ValidationError, key: str, value: Any) -> str:
    first = error.errors()[0]
    place, node = key, value
    for part in first["loc"]:  # pydantic's own names for the branches of a union stand in it too
        held: Any = node.get(part) if isinstance(node, Mapping) else None
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            held = node[part]
        if held is not None:
            place, node = f"{place}.{part}", held
    text = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "missing":
        text = f"{first['loc'][-1]} is missing"
    return f"{place}: {value!r}: {text}"


def check_node(node: Any, key: str = "", trust: Sequence[str] = (), given: Collection[str] = ()) -> None:
    """UserError, one line with the key, for the first thing in ``node`` that does not fit what it configures.

    Args:
        node: a plain container, resolved.
        key: its place in the config, for messages.
        given: arguments that the command passes itself, so the config need not name them.
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
    # A dataclass is annotated class by class, each in its own module; its generated __init__ knows only the last.
    annotated = target if dataclasses.is_dataclass(target) else function
    hints = get_type_hints(annotated, include_extras=True)
    names = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and n not in given]
    for name, value in node.items():
        if name.startswith("_") and name.endswith("_"):
            continue
        place = f"{key}.{name}"
        if name not in names:
            raise UserError(f"{place}: not a setting of {target.__name__}{suggestion(name, names)}")
        if value == "???":
            raise UserError(f"{place} is missing: give {place}=...")
        if not _holds_target(value) and name in hints:
            check_value(value, hints[name], place)
    if node.get("_partial_"):
        return
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in node and name not in ("args", "kwargs"):
            raise UserError(f"{key}.{name} is missing: give {key}.{name}=...")


def _holds_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(_holds_target(v) for v in value.values())
    return isinstance(value, list) and any(_holds_target(v) for v in value)


def check_value(value: Any, hint: Any, key: str) -> None:
    """UserError if ``value`` does not fit the annotation ``hint``."""
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError):
        try:
            adapter = TypeAdapter(hint)
        except (PydanticSchemaGenerationError, PydanticUserError):
            return  # an annotation that only names a class of another library; the constructor is the judge
    try:
        # Strict for single values: what would only fit after a conversion reaches the constructor unconverted.
        adapter.validate_python(value, strict=not isinstance(value, list | dict))
    except ValidationError as error:
        raise UserError(_say(error, key, value)) from error
