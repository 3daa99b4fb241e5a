"""Small copies of the first training images for the report of the run, and the list of damaged images."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.callbacks import Callback

from sdtune.data import ImageDataModule
from sdtune.data.previews import first_images
from sdtune.data.skipped import write_skipped
from sdtune.files import replacing, write_json
from sdtune.images.files import CENTER

_MOST_IMAGES = 12
_SIDE = 256
"""Longer side of a copy, in pixels."""


class TrainingImages(Callback):
    """Write copies of the first training images, cropped at the center, and ``images.json`` with their captions.

    ``skipped.csv``, in the run folder, lists the damaged images that are left out.

    Args:
        folder: folder of the copies, in the run folder.
    """

    priority: ClassVar[int] = -40

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_skipped(self.folder.parent, data.skipped)
        shown = []
        for number, (source, sample) in enumerate(first_images(data, _MOST_IMAGES)):
            image = Image.fromarray(sample.pixels(source.bucket(sample), CENTER, False))
            image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            name = f"{number:03d}.webp"
            with replacing(self.folder / name, sync=False) as partial:
                image.save(partial, format="WEBP", quality=88)
            shown.append({"file": name, "caption": sample.caption, "repeats": sample.repeats})
        counts = {"images": len(data.train), "validation_images": len(data.held_out)}
        write_json(
            self.folder / "images.json",
            {**counts, "class_images": sum(len(part.class_samples) for part in data.parts.values()), "shown": shown},
        )
