"""Optimizer parameter groups, one per component of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], rates: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Optimizer parameter groups: ``named_parameters`` grouped by component, each group with its ``name``.

    Args:
        rates: learning rates by component; ``text_encoder`` applies to all text encoders. Components with None, or
            without an entry, use the optimizer's learning rate.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        component = name.removeprefix("backbone.").split(".")[0]
        rate = rates.get(component.removesuffix("_2"))
        lr_override = {} if rate is None else {"lr": rate}
        groups.setdefault(component, {"name": component, "params": [], **lr_override})["params"].append(parameter)
    return list(groups.values())
