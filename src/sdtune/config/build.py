"""Build objects from a checked config, nested nodes first."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from sdtune.config.targets import resolve


def build(node: Mapping[str, Any] | None, trust: Sequence[str] = (), given: Mapping[str, Any] | None = None) -> Any:
    """Build the object that a checked ``node`` describes, nested nodes first; None for None.

    Args:
        given: additional arguments; the constructor gets those that it accepts.
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
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = {name: value for name, value in (given or {}).items() if accepts_all or name in parameters}
    return target(**arguments, **accepted)


def _value(value: Any, trust: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return build(value, trust) if "_target_" in value else {k: _value(v, trust) for k, v in value.items()}
    if isinstance(value, list):
        return [_value(v, trust) for v in value]
    return value
