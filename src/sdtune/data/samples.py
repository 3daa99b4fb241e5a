"""Protocol of a captioned image, and the cache keys of its latents and text embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sdtune.images.files import CENTER


class Sample(Protocol):
    """Image with its caption.

    ``size`` is (width, height) in pixels; ``repeats``, at least 1, is the number of uses per epoch.
    """

    @property
    def caption(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def repeats(self) -> int: ...

    def content(self) -> str:
        """Identifier of the image's content, part of the cache key of its latents."""

    def pixels(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        """Pixels of the image, uint8 [H, W, 3], scaled and cropped as :func:`sdtune.images.files.resize_and_crop` does.

        Args:
            size: (width, height) in pixels.
            offset: (x, y) in [0, 1], the fraction of the excess that is cropped at the left and at the top.
            flip: mirror left and right.
        """


class Masked(Sample, Protocol):
    """Sample with a loss mask."""

    def mask(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        """Loss mask uint8 [H, W], 255 where the loss counts, scaled and cropped like the image."""


@dataclass(frozen=True)
class View:
    """Input of the latent cache: a sample, scaled and center-cropped to ``size`` (width, height), mirrored or not."""

    sample: Sample
    size: tuple[int, int]
    flip: bool

    def tensor(self) -> Tensor:
        return to_tensor(self.sample.pixels(self.size, CENTER, self.flip))

    def __str__(self) -> str:
        return str(self.sample)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def latent_key(sample: Sample, size: tuple[int, int], flip: bool) -> str:
    """Cache key of the latent moments of ``sample`` at ``size`` (width, height)."""
    return f"{sample.content()}|{size[0]}x{size[1]}|centre|{'flip' if flip else 'plain'}"


def text_key(prompt: str) -> str:
    """Cache key of the text embeddings of ``prompt``."""
    return f"text|{prompt}"
