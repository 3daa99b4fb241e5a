"""Dataset of training rows: images or cached latents, prompts, crops, flips, control maps and masks."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from sdtune import streams
from sdtune.data.buckets import assign
from sdtune.data.cache import TensorCache
from sdtune.data.control.base import Control, map_to_tensor
from sdtune.data.order import ScheduledSample
from sdtune.data.prior import CLASS_POSITION_OFFSET, class_image_index
from sdtune.data.samples import Masked, Sample, latent_key, text_key, to_tensor
from sdtune.hardware.signals import STOP_SIGNALS
from sdtune.images.files import CENTER, frame
from sdtune.randomness import generator

Batch = dict[str, Any]
"""Keys of a batch:

* ``prompts``: list[str]; ``step``: int;
* ``positions``: list[int], part of the keys of each sample's random numbers: its position in the global batch (class
  images: plus ``CLASS_POSITION_OFFSET``) or among all validation samples. A list, because reading a tensor back from
  the device would block the step;
* ``frame``: float32 [B, 6], original height and width, top and left of the crop, height and width of the crop in
  pixels (diffusers' ``time_ids`` of SDXL), see :func:`sdtune.images.files.frame`;
* ``pixels``: float32 [B, 3, H, W] in [-1, 1], or, if latents are cached, ``moments``: float32 [B, 2C, h, w];
* ``text``: float32 [B, L, D], if text embeddings are cached;
* ``mask``: float32 [B, 1, h, w] in [0, 1], if the loss is masked;
* ``control``: float32 [B, 3, H, W] in [0, 1], if the data has control maps.

With class images, B is twice the number of pairs, and there are two more keys: ``subject_count``: int, the number of
subject images, which are the first rows; ``prior_weight``: float, the loss weight of the other rows (class images).
"""

Row = dict[str, Any]


@dataclass(frozen=True)
class RowSettings:
    """Settings of the dataset rows; loader processes receive them instead of the data module with its trainer.

    Args:
        batch_size: samples per optimizer step, over all processes and micro-batches.
        resolution, bucket_step: resolution of the buckets and step between their sides, in pixels.
        factor: downscaling factor of the VAE.
        prompt_templates: prompt templates with ``{}`` for the caption.
        caption_dropout_prompt: prompt that replaces a dropped caption.
        class_samples: class images; empty without prior preservation.
        latent_cache, text_cache: caches of the encoder outputs; None: they are computed in the step.
        seed: seed of the run.
        masked: whether rows have a loss mask; the others are those of
            :class:`~sdtune.data.datamodule.ImageDataModule`.
    """

    seed: int
    batch_size: int
    resolution: int
    bucket_step: int
    factor: int
    prompt_templates: Sequence[str]
    caption_dropout_prompt: str
    caption_dropout: float
    flip: bool
    random_crop: bool
    masked: bool
    control: Control | None
    class_samples: Sequence[Sample]
    latent_cache: TensorCache | None
    text_cache: TensorCache | None

    def bucket(self, sample: Sample) -> tuple[int, int]:
        """Training size (width, height) of ``sample``."""
        return assign(sample.size, self.resolution, self.bucket_step, name=str(sample))


class ImageDataset(Dataset[list[Row]]):
    """Dataset indexed by :class:`ScheduledSample`; an item is a list of the subject row and the class row, if any.

    Args:
        training: draw template, caption dropout, flip and crop at random, and add class rows; otherwise use the first
            template and the center crop.
    """

    def __init__(self, settings: RowSettings, samples: Sequence[Sample], training: bool) -> None:
        self.settings, self.samples, self.training = settings, samples, training

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: ScheduledSample) -> list[Row]:
        settings, sample = self.settings, self.samples[index.sample_index]
        size = settings.bucket(sample)
        rows = [self._row(sample, size, index.step, index.position)]
        if self.training and settings.class_samples:
            pair_number = index.step * settings.batch_size + index.position
            class_sample = settings.class_samples[
                class_image_index(settings.seed, len(settings.class_samples), pair_number)
            ]
            rows.append(self._row(class_sample, size, index.step, index.position + CLASS_POSITION_OFFSET))
        return rows

    def _row(self, sample: Sample, size: tuple[int, int], step: int, position: int) -> Row:
        settings, is_subject = self.settings, position < CLASS_POSITION_OFFSET
        prompt_templates = settings.prompt_templates if is_subject else ("{}",)
        prompt, flip, offset = prompt_templates[0].replace("{}", sample.caption), False, CENTER
        if self.training:
            u_drop, u_flip, x, y, u_template = generator(settings.seed, streams.ROW, step, position).random(5)
            prompt = prompt_templates[int(u_template * len(prompt_templates))].replace("{}", sample.caption)
            if u_drop < settings.caption_dropout:
                prompt = settings.caption_dropout_prompt if is_subject else ""
            flip = bool(settings.flip and u_flip < 0.5)
            offset = (float(x), float(y)) if settings.random_crop else offset
        row: Row = {"prompt": prompt, "step": step, "position": position}
        row["frame"] = torch.tensor(frame(sample.size, size, offset, flip), dtype=torch.float32)
        if settings.latent_cache is not None:
            row["moments"] = settings.latent_cache.get(latent_key(sample, size, flip))
        else:
            row["pixels"] = to_tensor(sample.pixels(size, offset, flip))
        if settings.control is not None:
            row["control"] = map_to_tensor(settings.control.map(sample, size, offset, flip))
        if settings.text_cache is not None:
            row["text"] = settings.text_cache.get(text_key(prompt))
        if settings.masked:
            factor = settings.factor
            # Class images have no mask: all of their pixels count.
            ones = torch.ones(1, size[1] // factor, size[0] // factor)
            row["mask"] = _mask(cast(Masked, sample), size, offset, flip, factor) if is_subject else ones
        return row


def _mask(sample: Masked, size: tuple[int, int], offset: tuple[float, float], flip: bool, factor: int) -> Tensor:
    pixel_mask = torch.from_numpy(sample.mask(size, offset, flip)).float()[None] / 255
    return F.avg_pool2d(pixel_mask, factor)


def collate(items: list[list[Row]], prior_weight: float) -> Batch:
    """Combine dataset items into a batch: first the subject rows, then the class rows.

    Args:
        prior_weight: loss weight of the class images.
    """
    subject_rows = [item[0] for item in items]
    rows = subject_rows + [row for item in items for row in item[1:]]
    batch: Batch = {
        "prompts": [row["prompt"] for row in rows],
        "step": rows[0]["step"],
        "positions": [row["position"] for row in rows],
    }
    for key in ("frame", "pixels", "moments", "text", "mask", "control"):
        if key in rows[0]:
            batch[key] = torch.stack([row[key] for row in rows])
    if len(rows) > len(subject_rows):
        batch |= {"subject_count": len(subject_rows), "prior_weight": prior_weight}
    return batch


def init_worker(worker: int) -> None:
    """Initialize a loader process: ignore the signals that stop a run, and turn off OpenCV's threads.

    Ctrl-C and a scheduler's SIGTERM reach every process of a run; only the training process handles them, by saving a
    checkpoint. A forked process does not inherit OpenCV's threads, so OpenCV must not use them here; without
    them a control map takes about a millisecond.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if (cv2 := sys.modules.get("cv2")) is not None:
        cv2.setNumThreads(0)
