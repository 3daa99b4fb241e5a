"""Control maps, aligned with each image's crop, size and flip: base classes, and maps read from a folder."""

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
from sdtune.images.files import CENTRE, SUFFIXES, open_image, resize_and_crop

if TYPE_CHECKING:
    from sdtune.data.samples import Sample

Resample = Literal["nearest", "bilinear"]

Task = Literal["edges", "depth", "segmentation", "pose"]

_READING_THREADS = 4
_ASPECT_TOLERANCE = 0.01


class Control(ABC):
    """Where the control map of an image comes from."""

    def open(self, samples: Sequence[Sample]) -> None:  # noqa: B027
        """UserError where one of ``samples`` has no usable map; loads no weights."""

    def prepare(  # noqa: B027
        self,
        samples: Sequence[Sample],
        rank: int = 0,
        processes: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """Make what needs a model, on ``device`` (the CPU if None), before training."""

    def content(self, sample: Sample) -> str:
        """A name for what a map hangs on beside its image and the settings."""
        return ""

    @abstractmethod
    def crop(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        """uint8 [H, W, 3], the same crop as :meth:`sdtune.data.samples.Sample.pixels` makes, not mirrored."""

    def map(
        self, sample: Sample, size: tuple[int, int], offset: tuple[float, float] = CENTRE, flip: bool = False
    ) -> np.ndarray:
        """uint8 [H, W, 3] for ``sample.pixels(size, offset, flip)``."""
        pixels = self.crop(sample, size, offset)
        # Mirrored last: an edge detector does not give the mirror image for a mirrored image, to the pixel.
        return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


class FromImage(Control):
    """A map that is made of its image, and so of any other, such as one that was drawn under it."""

    task: Task
    """What a map shows."""

    @abstractmethod
    def again(self, images: Sequence[np.ndarray], device: torch.device) -> list[np.ndarray]:
        """The maps of ``images`` (all uint8 [H, W, 3]) that are no samples of the data."""


class Computed(FromImage):
    """A map that the image's pixels alone decide."""

    name: ClassVar[str]
    """What ``sdtune sample`` calls it: ``preprocess``."""

    task = "edges"

    @abstractmethod
    def extract(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] from an image, uint8 [H, W, 3]."""

    def again(self, images: Sequence[np.ndarray], device: torch.device) -> list[np.ndarray]:
        return [self.extract(image) for image in images]

    def crop(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        return self.extract(sample.pixels(size, offset, False))


class Paired(Control):
    """A folder of maps with the images' own file names: segmentation, depth, pose, or any other kind.

    The map of ``a/b.jpg`` is ``b.png`` (or another image's suffix) in the folder, or ``a/b.png`` where it has the
    images' sub-folders.

    Args:
        path: the folder.
        resample: how a map is brought to its image's size; ``nearest`` for segmentation, so that classes do not
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
                remedy="name the folder of the maps, with the images' own file names",
            )
        found: dict[tuple[str, ...], Path] = {}
        for file in sorted(f for f in self.path.rglob("*") if f.suffix.lower() in SUFFIXES):
            name = file.relative_to(self.path).with_suffix("").parts
            if name in found:
                raise UserError(f"{file} and {found[name].name} have one name: remove one", key="data.control.path")
            found[name] = file
        owners: dict[Path, Path] = {}
        for sample in samples:
            image = _path(sample)
            parts = image.with_suffix("").parts
            own = next((found[parts[i:]] for i in range(1, len(parts)) if parts[i:] in found), None)
            if own is None:
                raise UserError(f"no map for {image}: put {image.stem}.png into {self.path}", key="data.control.path")
            other = owners.setdefault(own, image)
            if other != image:
                raise UserError(
                    f"{own} is the map of {other} and of {image}: put maps into folders named as the images' are",
                    key="data.control.path",
                )
            self._maps[image] = own
        with ThreadPoolExecutor(_READING_THREADS) as pool:
            for _ in pool.map(self._check, samples):
                pass

    def _check(self, sample: Sample) -> None:
        (width, height), file = sample.size, self._maps[_path(sample)]
        own = self._read(file).size
        if abs(own[0] * height / (own[1] * width) - 1) > _ASPECT_TOLERANCE:
            raise UserError(
                f"{file} is {own[0]}x{own[1]} pixels and its image {width}x{height}; a map shows all"
                " of its image, so make it again with the same aspect",
                key="data.control.path",
            )

    def _read(self, file: Path) -> Image.Image:
        return open_image(file, "data.control.path")

    def content(self, sample: Sample) -> str:
        return hashlib.sha256(self._maps[_path(sample)].read_bytes()).hexdigest()

    def crop(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        return fit(self._read(self._maps[_path(sample)]), size, offset, self.resample)


def _path(sample: Sample) -> Path:
    path = getattr(sample, "path", None)
    if not isinstance(path, Path):
        raise UserError(
            "paired maps go by the names of image files (data=folder); this data has none", key="data.control"
        )
    return path.absolute()


def fit(
    image: Image.Image, size: tuple[int, int], offset: tuple[float, float] = CENTRE, resample: Resample = "bilinear"
) -> np.ndarray:
    """A map uint8 [H, W, 3] scaled to cover ``size`` (width, height) and cropped, as images are."""
    return resize_and_crop(image, size, offset, resample=Image.Resampling[resample.upper()])


def as_map(pixels: np.ndarray) -> Tensor:
    """float32 [3, H, W] in [0, 1] from uint8 [H, W, 3]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
