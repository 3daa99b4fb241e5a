"""Data from a folder of images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge

from sdtune.data.datamodule import ImageDataModule
from sdtune.data.folder import MASK, CaptionedImage, check_images, read_image_folder
from sdtune.data.samples import Sample
from sdtune.errors import UserError
from sdtune.images.files import open_image, resize_and_crop


class FileSample:
    """An image file with its caption."""

    def __init__(self, image: CaptionedImage, repeats: int) -> None:
        self.path, self.caption, self.size = image.path, image.caption, image.size
        self.repeats = image.repeats * repeats

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def _sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def content(self) -> str:
        return self._sha256

    def pixels(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        return resize_and_crop(open_image(self.path), size, offset, flip)

    @property
    def mask_path(self) -> Path:
        """``image.mask.png`` beside ``image.jpg``."""
        return self.path.with_name(f"{self.path.stem}{MASK}")

    def mask(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        return resize_and_crop(open_image(self.mask_path), size, offset, flip)[..., 0]

    def check_mask(self) -> None:
        """UserError where there is no mask of the image's size."""
        if not self.mask_path.is_file():
            raise UserError(
                f"{self.mask_path} is missing", key="data.masked", remedy=f"draw one of {self.path.name}, white counts"
            )
        if (found := open_image(self.mask_path).size) != self.size:
            raise UserError(
                f"{self.mask_path} is {found[0]}x{found[1]} pixels, its image {self.size[0]}x{self.size[1]}",
                key="data.masked",
                remedy="make them equal",
            )


@dataclass(kw_only=True, eq=False)
class Folder(ImageDataModule):
    """A folder of one's own images; :func:`sdtune.data.folder.read_image_folder` tells where captions come from.

    Args:
        path: the folder.
        prompt: caption of the images that have none of their own.
        trigger: put before each caption, and never dropped.
        repeats: how often each image counts, on top of what a ``10_words`` folder says.
        hold_out: every so-manieth image (10: one in ten) is kept for the validation loss, not trained on.
        validation_path: a folder of its own for the validation loss.
    """

    path: str
    prompt: str | None = None
    trigger: str | None = None
    repeats: Annotated[int, Ge(1)] = 1
    hold_out: Annotated[int, Ge(2)] | None = None
    validation_path: str | None = None

    keep: str = field(default="", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = Path(self.path).expanduser().resolve().name
        self.keep = self.trigger or ""
        if self.hold_out and self.validation_path:
            raise UserError("data.hold_out and data.validation_path: name one of the two")

    def _images(self, path: str) -> list[CaptionedImage]:
        templated = {"ask": 'give the bare word, data.prompt="<my_cat>", for data.templates to go around'}
        images = read_image_folder(path, self.prompt, self.trigger, **(templated if self.templates else {}))
        check_images(images)
        return list(images)

    def read_class(self, path: str) -> Sequence[Sample]:
        assert isinstance(self.class_prompt, str | None)
        ask = 'give one for them all with data.class_prompt="a photo of a dog", or a .txt file beside each'
        images = read_image_folder(path, self.class_prompt, key="data.class_path", ask=ask)
        check_images(images)
        return [FileSample(p, 1) for p in images]

    def read(self) -> tuple[Sequence[Sample], Sequence[Sample]]:
        found = self._images(self.path)
        kept = found[self.hold_out - 1 :: self.hold_out] if self.hold_out else []
        if self.validation_path:
            kept = self._images(self.validation_path)
        elif self.hold_out and not kept:
            raise UserError(
                f"{self.path} has {len(found)} images, too few to hold out one in {self.hold_out}", key="data.hold_out"
            )
        away = {image.path for image in kept}
        train = [FileSample(p, self.repeats) for p in found if p.path not in away]
        held_out = [FileSample(p, 1) for p in kept]
        if self.masked:
            for sample in (*train, *held_out):
                sample.check_mask()
        return train, held_out
