"""Keep models in main memory whose outputs are cached, to save memory on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class CpuOffload:
    """Keeps models in main memory; :meth:`on_device` moves the decoder to the device for as long as it is needed.

    Args:
        decoder: the VAE; empty if it is trained or its latents are not cached.
        encoders: text encoders; :func:`sdtune.sampling.loop.generate` moves them to the device by itself.
        device: the training device.
    """

    def __init__(
        self,
        decoder: Sequence[nn.Module] = (),
        encoders: Sequence[nn.Module] = (),
        device: torch.device | None = None,
    ) -> None:
        self.decoder, self.encoders, self.device = decoder, encoders, device
        for part in (*decoder, *encoders):
            part.to("cpu")

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Context manager that moves the decoder to the device and back to main memory."""
        try:
            for part in self.decoder:
                part.to(self.device)
            yield
        finally:
            for part in self.decoder:
                part.to("cpu")
