"""Data module for a folder of images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from PIL import Image

from sdtune.data.control.base import Paired
from sdtune.data.datamodule import ImageDataModule, MaskSource
from sdtune.data.folder import CaptionedImage, check_images, is_root_name_warning, mask_path, read_image_folder
from sdtune.data.samples import Sample
from sdtune.errors import UserError
from sdtune.images.files import open_alpha, open_image, open_mask, resize_and_crop


class FileSample:
    """Sample that is read from an image file."""

    def __init__(self, image: CaptionedImage, repeats: int, mask: MaskSource | None = None) -> None:
        self.mask_source = mask
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
        """Path of the mask: ``image.mask.png`` next to ``image.jpg``."""
        return mask_path(self.path)

    def mask(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        return resize_and_crop(self._mask_image().convert("RGB"), size, offset, flip)[..., 0]

    def _mask_image(self) -> Image.Image:
        if self.mask_source == "file":
            return open_mask(self.mask_path, "data.mask")
        return open_alpha(self.path) or Image.new("L", self.size, 255)

    def has_alpha(self) -> bool:
        """Whether the image file has transparency."""
        return open_alpha(self.path) is not None

    def check_mask(self) -> str | None:
        """Check that there is a mask of the image's size; returns a warning if it is black everywhere.

        Raises:
            UserError: the mask is missing or has another size.
        """
        if self.mask_source == "alpha":
            return None  # wholly transparent images have been reported
        if not self.mask_path.is_file():
            raise UserError(
                f"{self.mask_path} is missing",
                key="data.mask",
                remedy=f"add a mask of {self.path.name}, white where the loss counts",
            )
        mask = self._mask_image()
        if (size := mask.size) != self.size:
            raise UserError(
                f"{self.mask_path} is {size[0]}x{size[1]} pixels but its image is {self.size[0]}x{self.size[1]}",
                key="data.mask",
                remedy="save the mask at the size of the image",
            )
        return (
            f"WARNING: {self.mask_path} is black everywhere, so its image does not contribute to the loss"
            if mask.getextrema()[1] == 0
            else None
        )


@dataclass(kw_only=True, eq=False)
class Folder(ImageDataModule):
    """Data module for a folder of images; :func:`sdtune.data.folder.read_image_folder` documents the captions.

    Args:
        path: folder of the images.
        prompt: caption of the images that have no other caption.
        trigger: trigger word, put before each caption that does not start with it; it stays when a caption is
            dropped.
        repeats: repeats of each image, multiplied by the number in a folder name such as ``10_words``.
        hold_out: hold out every n-th image for the validation loss (10: one in ten).
        validation_path: separate folder of images for the validation loss.
    """

    path: str
    prompt: str | None = None
    trigger: str | None = None
    repeats: Annotated[int, Ge(1)] = 1
    hold_out: Annotated[int, Ge(2)] | None = None
    validation_path: str | None = None

    _uses_prompt: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = Path(self.path).expanduser().resolve().name
        if self.hold_out and self.validation_path:
            raise UserError(
                "cannot be combined with data.validation_path", key="data.hold_out", remedy="remove one of the two"
            )

    def _roles(self, key: str) -> dict[Path, str]:
        """Folders that settings other than ``key`` use: resolved path -> config key."""
        control_path = self.control.path if isinstance(self.control, Paired) else None
        paths = {
            "data.path": self.path,
            "data.class_path": self.class_path,
            "data.validation_path": self.validation_path,
            "data.control.path": control_path,
        }
        return {Path(path).expanduser().resolve(): role for role, path in paths.items() if path and role != key}

    def _images(self, path: str, key: str) -> list[CaptionedImage]:
        remedy = 'set data.prompt to the new token, as in data.prompt="<my_cat>"; data.templates adds the other words'
        arguments: dict[str, Any] = {"caption_remedy": remedy} if self.templates else {}
        folder = read_image_folder(path, self.prompt, self.trigger, key, other_roles=self._roles(key), **arguments)
        notices = [line for line in folder.notices if self.repeats == 1 or not is_root_name_warning(line)]
        self.notices += [*notices, *check_images(folder.images, key)]
        self._uses_prompt = self._uses_prompt or folder.uses_prompt
        return list(folder.images)

    def read_class(self, path: str) -> Sequence[Sample]:
        assert isinstance(self.class_prompt, str | None)
        key, remedy = (
            "data.class_path",
            'set data.class_prompt="a photo of a dog", or add a .txt file next to each image',
        )
        folder = read_image_folder(path, self.class_prompt, None, key, remedy, self._roles(key))
        self.notices += [*folder.notices, *check_images(folder.images, key)]
        return [FileSample(image, 1) for image in folder.images]

    def read(self) -> tuple[Sequence[Sample], Sequence[Sample]]:
        self._uses_prompt = False
        images = self._images(self.path, "data.path")
        validation_images = images[self.hold_out - 1 :: self.hold_out] if self.hold_out else []
        if self.validation_path:
            validation_images = self._images(self.validation_path, "data.validation_path")
        elif self.hold_out and not validation_images:
            raise UserError(
                f"{self.path} has {len(images)} images, too few to hold out one in {self.hold_out}",
                key="data.hold_out",
                remedy="set a smaller number or add images",
            )
        validation_paths = {image.path for image in validation_images}
        train = [FileSample(image, self.repeats, self.mask) for image in images if image.path not in validation_paths]
        held_out = [FileSample(image, 1, self.mask) for image in validation_images]
        if self.mask is not None:
            self.notices += [warning for sample in (*train, *held_out) if (warning := sample.check_mask())]
        if self.mask == "alpha" and not any(sample.has_alpha() for sample in train):
            self.notices.append("WARNING: data.mask=alpha, but no image has transparency; all pixels count")
        if self.prompt not in (None, self.trigger) and not self._uses_prompt:
            self.notices.append("WARNING: data.prompt is not used: all images have captions")
        return train, held_out
