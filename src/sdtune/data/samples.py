"""One captioned image, and the cache keys of its encodings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sdtune.images.files import CENTRE


class Sample(Protocol):
    """An image with its caption; ``size`` is (width, height) in pixels."""

    @property
    def caption(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def repeats(self) -> int: ...

    def content(self) -> str:
        """A name for the image's content, by which its latents are cached."""

    def pixels(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        """uint8 [H, W, 3], scaled to cover ``size`` (width, height) and cropped at ``offset`` (shares of the room)."""


class Masked(Sample, Protocol):
    """An image that says what of it counts."""

    def mask(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        """uint8 [H, W], 255 where the loss counts, scaled and cropped as the image."""


@dataclass(frozen=True)
class View:
    """A sample as it is cached: scaled and cropped at the centre to ``size`` (width, height), mirrored or not."""

    sample: Sample
    size: tuple[int, int]
    flip: bool

    def tensor(self) -> Tensor:
        return to_tensor(self.sample.pixels(self.size, CENTRE, self.flip))

    def __str__(self) -> str:
        return str(self.sample)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """float32 [3, H, W] in [-1, 1] from uint8 [H, W, 3]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def latent_key(sample: Sample, size: tuple[int, int], flip: bool) -> str:
    """Names the moments of ``sample`` at ``size``."""
    return f"{sample.content()}|{size[0]}x{size[1]}|centre|{'flip' if flip else 'plain'}"


def text_key(prompt: str) -> str:
    """Names the text states of ``prompt``."""
    return f"text|{prompt}"
