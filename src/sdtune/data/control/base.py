"""Control maps that match the crop, size and flip of their images: base classes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdtune.images.files import CENTER, resize_and_crop

if TYPE_CHECKING:
    from sdtune.data.samples import Sample, SampleSequence

Resample = Literal["nearest", "bilinear"]

Task = Literal["edges", "depth", "segmentation", "pose"]


class Control(ABC):
    """Source of the control maps of a data set."""

    reads_files: ClassVar[bool] = False
    """Whether the maps are files of the data set, whose contents then belong to it."""

    def open(self, samples: SampleSequence) -> None:  # noqa: B027
        """Check that each of ``samples`` has a usable map, without loading weights.

        Raises:
            UserError: a map is missing or unusable.
        """

    def prepare(  # noqa: B027
        self,
        samples: Iterable[Sample],
        rank: int = 0,
        processes: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """Compute the maps that need a model, before training, on ``device`` (None: the CPU)."""

    def content(self, sample: Sample, size: tuple[int, int], flip: bool) -> str:
        """Identifier of the center-cropped map of ``sample`` at ``size``, part of the cache key of its latents.

        By default a hash of the map's pixels. A source that knows what its maps are computed from is faster with that.
        """
        return hashlib.sha256(self.map(sample, size, CENTER, flip).tobytes()).hexdigest()

    @abstractmethod
    def unmirrored_map(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        """Control map with the crop of :meth:`sdtune.data.samples.Sample.pixels`, not mirrored: uint8 [H, W, 3]."""

    def map(
        self, sample: Sample, size: tuple[int, int], offset: tuple[float, float] = CENTER, flip: bool = False
    ) -> np.ndarray:
        """Control map that matches ``sample.pixels(size, offset, flip)``: uint8 [H, W, 3]."""
        pixels = self.unmirrored_map(sample, size, offset)
        # Mirror the finished map: edges detected in a mirrored image differ by single pixels.
        return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


class FromImage(Control):
    """Source that computes control maps from pixels; it also works for images outside of the data set."""

    task: Task
    """Content of the maps."""

    @abstractmethod
    def extract_maps(self, images: Sequence[np.ndarray], device: torch.device) -> list[np.ndarray]:
        """Compute the maps of images that are not samples, such as generated images; all are uint8 [H, W, 3]."""


class Computed(FromImage):
    """Source that computes control maps from the image's pixels without a model."""

    name: ClassVar[str]
    """Value of ``preprocess`` in ``sdtune sample`` that selects this class."""

    task = "edges"

    @abstractmethod
    def extract(self, pixels: np.ndarray) -> np.ndarray:
        """Compute the map of an image; both are uint8 [H, W, 3]."""

    def extract_maps(self, images: Sequence[np.ndarray], device: torch.device) -> list[np.ndarray]:
        return [self.extract(image) for image in images]

    def unmirrored_map(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        return self.extract(sample.pixels(size, offset, False))


def fit(
    image: Image.Image, size: tuple[int, int], offset: tuple[float, float] = CENTER, resample: Resample = "bilinear"
) -> np.ndarray:
    """Scale a map to cover ``size`` (width, height) and crop it like an image; returns uint8 [H, W, 3]."""
    return resize_and_crop(image, size, offset, resample=Image.Resampling[resample.upper()])


def map_to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert uint8 [H, W, 3] to float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
