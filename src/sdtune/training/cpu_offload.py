"""CPU offload of models whose outputs are cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class CpuOffload:
    """Keeps ``parts`` in main memory; :meth:`on_device` moves them to the device for as long as they are needed."""

    def __init__(self, parts: Sequence[nn.Module] = (), device: torch.device | None = None) -> None:
        self.parts, self.device = parts, device
        self._offload()

    def _offload(self) -> None:
        for part in self.parts:
            part.to("cpu")

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Context manager that moves the parts to the device and back to main memory."""
        try:
            for part in self.parts:
                part.to(self.device)
            yield
        finally:
            self._offload()
