"""Optimizer parameter groups, one for each component of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], rates: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """``named_parameters`` grouped by the component of the backbone that they belong to.

    Args:
        rates: the learning rate of a component that has one of its own; ``text_encoder`` goes for all of them.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        component = name.removeprefix("backbone.").split(".")[0]
        rate = rates.get(component.removesuffix("_2"))
        own = {} if rate is None else {"lr": rate}
        groups.setdefault(component, {"name": component, "params": [], **own})["params"].append(parameter)
    return list(groups.values())
