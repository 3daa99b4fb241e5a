"""Swap a model's parameters for other values, temporarily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def swapped(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, ``module``'s parameters named in ``values`` hold those; afterwards their own, to the bit."""
    own = {name: p.data for name, p in module.named_parameters() if name in values}
    try:
        for name, p in module.named_parameters():
            if name in own:
                p.data = values[name].to(p.device, p.dtype)
        yield
    finally:
        for name, p in module.named_parameters():
            if name in own:
                p.data = own[name]
