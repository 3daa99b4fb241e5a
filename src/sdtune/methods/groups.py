"""Optimizer groups by the part of the model that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdtune.methods.base import Adapter


def by_component(adapter: Adapter, rates: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """What ``adapter`` trains, but new tokens, grouped by the component of the backbone that it belongs to.

    Args:
        rates: the learning rate of a component that has one of its own; ``text_encoder`` goes for all of them.
    """
    words = {id(vectors) for vectors in adapter.backbone.learned}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in adapter.trainable():
        component = name.removeprefix("backbone.").split(".")[0]
        if id(parameter) not in words:
            rate = rates.get(component.removesuffix("_2"))
            own = {} if rate is None else {"lr": rate}
            groups.setdefault(component, {"name": component, "params": [], **own})["params"].append(parameter)
    return list(groups.values())
