"""The dataset: a batch's images, prompts, crops, flips, control maps and cached encodings."""

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
from sdtune.data.control.base import Control, as_map
from sdtune.data.order import ScheduledSample
from sdtune.data.prior import PLACE, partner
from sdtune.data.samples import Masked, Sample, latent_key, text_key, to_tensor
from sdtune.hardware.signals import STOP_SIGNALS
from sdtune.images.files import CENTRE, frame
from sdtune.randomness import generator

Batch = dict[str, Any]
"""prompts: list[str]; step: int; positions: list[int] (no tensor: read on a device, it would make the step wait);
frame (float32 [B, 6]: where each crop comes from, as sdtune.images.files.frame has it); and
either pixels (float32 [B, 3, H, W] in [-1, 1]) or moments (float32 [B, 2C, h, w]); text (float32 [B, L, D]) where text
states are cached; mask (float32 [B, 1, h, w] in [0, 1]) where the loss is masked; control (float32 [B, 3, H, W] in
[0, 1]) where the data has control maps. With class images B is twice the pairs: the subject's rows come first,
``instances: int`` of them, and ``prior_weight: float`` is the weight of the others."""

Row = dict[str, Any]


@dataclass(frozen=True)
class RowSettings:
    """What the rows of a data set depend on beside its samples; made by the data module, so that loader processes get
    this and not the module with its trainer.

    Args:
        batch_size: samples an optimizer step, over all processes and accumulation steps.
        resolution, bucket_step, factor: of the buckets and of the VAE, in pixels.
        texts: prompt templates, with ``{}`` where the caption goes.
        keep: what a dropped caption keeps.
        class_samples: images of the class, if they train beside the subject's.
        latent_cache, text_cache: what frozen encoders have made; None where it is made in the step.
    """

    seed: int
    batch_size: int
    resolution: int
    bucket_step: int
    factor: int
    texts: Sequence[str]
    keep: str
    caption_dropout: float
    flip: bool
    random_crop: bool
    masked: bool
    control: Control | None
    class_samples: Sequence[Sample]
    latent_cache: TensorCache | None
    text_cache: TensorCache | None

    def bucket(self, sample: Sample) -> tuple[int, int]:
        """The (width, height) that ``sample`` is trained at."""
        return assign(sample.size, self.resolution, self.bucket_step, name=str(sample))


class ImageDataset(Dataset[list[Row]]):
    """Each draw gives a row; in training, where there are class images, a pair of them."""

    def __init__(self, settings: RowSettings, samples: Sequence[Sample], training: bool) -> None:
        self.settings, self.samples, self.training = settings, samples, training

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: ScheduledSample) -> list[Row]:
        data, sample = self.settings, self.samples[draw.entry]
        size = data.bucket(sample)
        rows = [self._row(sample, size, draw.step, draw.position)]
        if self.training and data.class_samples:
            number = draw.step * data.batch_size + draw.position
            other = data.class_samples[partner(data.seed, len(data.class_samples), number)]
            rows.append(self._row(other, size, draw.step, draw.position + PLACE))
        return rows

    def _row(self, sample: Sample, size: tuple[int, int], step: int, position: int) -> Row:
        data, subject = self.settings, position < PLACE
        texts = data.texts if subject else ("{}",)
        prompt, flip, offset = texts[0].replace("{}", sample.caption), False, CENTRE
        if self.training:
            dropped, flipped, x, y, text = generator(data.seed, streams.ROW, step, position).random(5)
            prompt = texts[int(text * len(texts))].replace("{}", sample.caption)
            prompt = (data.keep if subject else "") if dropped < data.caption_dropout else prompt
            flip = bool(data.flip and flipped < 0.5)
            offset = (float(x), float(y)) if data.random_crop else offset
        row: Row = {"prompt": prompt, "step": step, "position": position}
        row["frame"] = torch.tensor(frame(sample.size, size, offset, flip), dtype=torch.float32)
        if data.latent_cache is not None:
            row["moments"] = data.latent_cache.get(latent_key(sample, size, flip))
        else:
            row["pixels"] = to_tensor(sample.pixels(size, offset, flip))
        if data.control is not None:
            row["control"] = as_map(data.control.map(sample, size, offset, flip))
        if data.text_cache is not None:
            row["text"] = data.text_cache.get(text_key(prompt))
        if data.masked:
            shape = (1, size[1] // data.factor, size[0] // data.factor)
            # All of a class image counts.
            row["mask"] = _mask(cast(Masked, sample), size, offset, flip, data.factor) if subject else torch.ones(shape)
        return row


def _mask(sample: Masked, size: tuple[int, int], offset: tuple[float, float], flip: bool, factor: int) -> Tensor:
    drawn = torch.from_numpy(sample.mask(size, offset, flip)).float()[None] / 255
    return F.avg_pool2d(drawn, factor)


def collate(pairs: list[list[Row]], prior_weight: float) -> Batch:
    """Rows into a batch, those of the class behind those of the subject."""
    subject = [pair[0] for pair in pairs]
    rows = subject + [row for pair in pairs for row in pair[1:]]
    batch: Batch = {
        "prompts": [row["prompt"] for row in rows],
        "step": rows[0]["step"],
        "positions": [row["position"] for row in rows],
    }
    for key in ("frame", "pixels", "moments", "text", "mask", "control"):
        if key in rows[0]:
            batch[key] = torch.stack([row[key] for row in rows])
    if len(rows) > len(subject):
        batch |= {"instances": len(subject), "prior_weight": prior_weight}
    return batch


def begin_worker(worker: int) -> None:
    """In a new loader process: ignore the signals that stop a run, and have OpenCV compute in the process's thread.

    Ctrl-C and a scheduler's SIGTERM reach every process of a run; only the training one answers, by saving. OpenCV's
    threads do not survive the fork, and a map takes a millisecond.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if (cv2 := sys.modules.get("cv2")) is not None:
        cv2.setNumThreads(0)
