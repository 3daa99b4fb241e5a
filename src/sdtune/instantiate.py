"""From a composed config to objects: only allowed targets, checked against their constructors, in one pass.

Constructor signatures are the schema: types by annotation, ranges by ``Annotated``.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from sdtune.suggest import suggestion

ALLOWED = (
    "sdtune",
    "torch.optim",
    "pytorch_lightning",
    "transformers.optimization",
    "bitsandbytes.optim",
    "prodigyopt",
)
"""Packages whose classes and functions a config may name; users add theirs with ``trust=[...]``."""


_FUNCTIONS = ("sdtune.loggers",)

_EXTRAS = dict.fromkeys(("bitsandbytes", "prodigyopt"), ", or 'sdtune[optimizers]'")


def _trusted(module: str, prefixes: Sequence[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def _allowed(module: str, trust: Sequence[str]) -> bool:
    return _trusted(module, (*ALLOWED, *trust))


def resolve(target: str, key: str, trust: Sequence[str] = ()) -> Any:
    """The class or function that ``target`` names.

    What counts is where the thing found was defined: a prefix on the string alone is bypassed by a path that walks
    through a module's imports, ``pytorch_lightning.trainer.os.system``.
    """
    if not _allowed(target.rpartition(".")[0], trust):
        raise ValueError(f"{key}._target_: {target} is not allowed; add trust=[{target.split('.')[0]}] if you trust it")
    found: Any = None
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name and not target.startswith(error.name):
                raise ValueError(f"{key}._target_: {target} needs {error.name}: pip install it") from error
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        break
    if found is None and importlib.util.find_spec(parts[0]) is None:
        raise ValueError(f"{key}._target_: {target} needs {parts[0]}: pip install it{_EXTRAS.get(parts[0], '')}")
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise ValueError(f"{key}._target_: {target} is neither a class nor a function")
    if not _allowed(found.__module__, trust):
        raise ValueError(f"{key}._target_: {target} leads to {found.__module__}, which is not allowed")
    if inspect.isfunction(found) and found.__module__ not in _FUNCTIONS and not _trusted(found.__module__, trust):
        # Classes are built; a function is done, whatever it does.
        raise ValueError(f"{key}._target_: {target} is a function, not a class that can be configured")
    return found


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


def check(node: Any, key: str = "", trust: Sequence[str] = (), given: Collection[str] = ()) -> None:
    """ValueError, one line with the key, for the first thing in ``node`` that does not fit what it configures.

    Args:
        node: a plain container, resolved.
        key: its place in the config, for messages.
        given: arguments that the command passes itself, so the config need not name them.
    """
    if isinstance(node, Mapping):
        if node.get("_target_"):
            _check_call(node, key, trust, given)
        for name, value in node.items():
            check(value, f"{key}.{name}" if key else str(name), trust)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check(value, f"{key}[{index}]", trust)


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
            raise ValueError(f"{place}: not a setting of {target.__name__}{suggestion(name, names)}")
        if value == "???":
            raise ValueError(f"{place} is missing: give {place}=...")
        if not _holds_target(value) and name in hints:
            check_value(value, hints[name], place)
    if node.get("_partial_"):
        return
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in node and name not in ("args", "kwargs"):
            raise ValueError(f"{key}.{name} is missing: give {key}.{name}=...")


def _holds_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(_holds_target(v) for v in value.values())
    return isinstance(value, list) and any(_holds_target(v) for v in value)


def check_value(value: Any, hint: Any, key: str) -> None:
    """ValueError if ``value`` does not fit the annotation ``hint``."""
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
        raise ValueError(_say(error, key, value)) from error


def build(node: Mapping[str, Any] | None, trust: Sequence[str] = (), given: Mapping[str, Any] | None = None) -> Any:
    """The object that a checked ``node`` describes, nested nodes first. None from None.

    Args:
        given: further arguments, of which a constructor gets those that it takes.
    """
    if node is None:
        return None
    target = resolve(str(node["_target_"]), "config", trust)
    arguments = {
        name: _value(v, trust) for name, v in node.items() if not (name.startswith("_") and name.endswith("_"))
    }
    if node.get("_partial_"):
        return lambda *args: target(*args, **arguments)
    parameters = inspect.signature(target).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = {name: value for name, value in (given or {}).items() if takes_all or name in parameters}
    return target(**arguments, **taken)


def _value(value: Any, trust: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return build(value, trust) if "_target_" in value else {k: _value(v, trust) for k, v in value.items()}
    if isinstance(value, list):
        return [_value(v, trust) for v in value]
    return value
