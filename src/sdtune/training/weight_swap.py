"""Temporarily replace parameters of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def swapped_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager that sets the parameters in ``values`` and restores the original ones, bit for bit, on exit.

    Meanwhile the original ones are in main memory.
    """
    original = {name: p.data.cpu() for name, p in module.named_parameters() if name in values}
    try:
        for name, p in module.named_parameters():
            if name in original:
                p.data = values[name].to(p.device, p.dtype)
        yield
    finally:
        for name, p in module.named_parameters():
            if name in original:
                p.data = original[name].to(p.device)
