"""CPU offload of model parts whose outputs are cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class CpuOffload:
    """Keeps ``parts`` in main memory, from when it is made."""

    def __init__(self, parts: Sequence[nn.Module] = (), device: torch.device | None = None) -> None:
        self.parts, self.device = parts, device
        self._leave()

    def _leave(self) -> None:
        for part in self.parts:
            part.to("cpu")

    @contextmanager
    def back(self) -> Iterator[None]:
        """Within it, they are on the device."""
        try:
            for part in self.parts:
                part.to(self.device)
            yield
        finally:
            self._leave()
