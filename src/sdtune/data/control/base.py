"""Control maps that match the crop, size and flip of their images: base classes, and maps read from a folder."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdtune.errors import UserError
from sdtune.images.files import CENTER, SUFFIXES, open_image, resize_and_crop

if TYPE_CHECKING:
    from sdtune.data.samples import Sample

Resample = Literal["nearest", "bilinear"]

Task = Literal["edges", "depth", "segmentation", "pose"]

_READING_THREADS = 4
_ASPECT_TOLERANCE = 0.01


class Control(ABC):
    """Source of the control maps of a data set."""

    def open(self, samples: Sequence[Sample]) -> None:  # noqa: B027
        """Check that each of ``samples`` has a usable map, without loading weights.

        Raises:
            UserError: a map is missing or unusable.
        """

    def prepare(  # noqa: B027
        self,
        samples: Sequence[Sample],
        rank: int = 0,
        processes: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """Compute the maps that need a model, before training, on ``device`` (None: the CPU)."""

    def content(self, sample: Sample) -> str:
        """Hash of the map if it is read from a file; empty if the map is computed from the image and the settings."""
        return ""

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


class Paired(Control):
    """Control maps from a folder of files named like the images: segmentation, depth, pose, or any other kind.

    The map of ``a/b.jpg`` is ``b.png`` (or another image suffix) in the folder, or ``a/b.png`` if the folder has the
    sub-folders of the images.

    Args:
        path: folder of the maps.
        resample: filter that scales a map to its image's size; ``nearest`` for segmentation, so that classes do not
            blend.
    """

    def __init__(self, path: str, resample: Resample = "bilinear") -> None:
        self.path, self.resample = Path(path).expanduser().absolute(), resample
        self._maps: dict[Path, Path] = {}

    def open(self, samples: Sequence[Sample]) -> None:
        if not self.path.is_dir():
            raise UserError(
                f"{self.path} is not a folder",
                key="data.control.path",
                remedy="set a folder of maps that are named like the images",
            )
        files: dict[tuple[str, ...], Path] = {}
        for file in sorted(f for f in self.path.rglob("*") if f.suffix.lower() in SUFFIXES):
            name = file.relative_to(self.path).with_suffix("").parts
            if name in files:
                raise UserError(
                    f"{file} and {files[name].name} have the same name without suffix",
                    key="data.control.path",
                    remedy="remove one",
                )
            files[name] = file
        image_of_map: dict[Path, Path] = {}
        for sample in samples:
            image = _path(sample)
            parts = image.with_suffix("").parts
            map_file = next((files[parts[i:]] for i in range(1, len(parts)) if parts[i:] in files), None)
            if map_file is None:
                raise UserError(
                    f"no map for {image}", key="data.control.path", remedy=f"add {image.stem}.png to {self.path}"
                )
            first_image = image_of_map.setdefault(map_file, image)
            if first_image != image:
                raise UserError(
                    f"{map_file} is the map of {first_image} and of {image}",
                    key="data.control.path",
                    remedy="put the maps into sub-folders named like those of the images",
                )
            self._maps[image] = map_file
        with ThreadPoolExecutor(_READING_THREADS) as pool:
            for _ in pool.map(self._check, samples):
                pass

    def _check(self, sample: Sample) -> None:
        (width, height), file = sample.size, self._maps[_path(sample)]
        map_size = self._read(file).size
        if abs(map_size[0] * height / (map_size[1] * width) - 1) > _ASPECT_TOLERANCE:
            raise UserError(
                f"{file} is {map_size[0]}x{map_size[1]} pixels but its image is {width}x{height}",
                key="data.control.path",
                remedy="make a map of the full image, with the same aspect ratio",
            )

    def _read(self, file: Path) -> Image.Image:
        return open_image(file, "data.control.path")

    def content(self, sample: Sample) -> str:
        return hashlib.sha256(self._maps[_path(sample)].read_bytes()).hexdigest()

    def unmirrored_map(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        return fit(self._read(self._maps[_path(sample)]), size, offset, self.resample)


def _path(sample: Sample) -> Path:
    path = getattr(sample, "path", None)
    if not isinstance(path, Path):
        raise UserError(
            "paired maps are found by image file name, but this data has no image files",
            key="data.control",
            remedy="use data=folder or another data/control",
        )
    return path.absolute()


def fit(
    image: Image.Image, size: tuple[int, int], offset: tuple[float, float] = CENTER, resample: Resample = "bilinear"
) -> np.ndarray:
    """Scale a map to cover ``size`` (width, height) and crop it like an image; returns uint8 [H, W, 3]."""
    return resize_and_crop(image, size, offset, resample=Image.Resampling[resample.upper()])


def map_to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert uint8 [H, W, 3] to float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
