"""Log a summary of the data before training: images, buckets, order, captions."""

from __future__ import annotations

import logging
from functools import partial
from typing import ClassVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sdtune.backbone.backbone import Backbone
from sdtune.data import ImageDataModule
from sdtune.methods.base import Adapter
from sdtune.sampling.prompts import count_tokens

log = logging.getLogger("sdtune")


class DataSummary(Callback):
    """Log the data summary when the tokenizer, which counts the tokens of the captions, is loaded.

    Args:
        steps: optimizer steps of the training.
    """

    priority: ClassVar[int] = -40

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        if trainer.is_global_zero:
            data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
            sizes = size_warnings(data, pl_module.source.facts.side)
            for line in (*summary(data, self.steps), *sizes, *caption_summary(data, pl_module.backbone)):
                log.info(line)


def summary(data: ImageDataModule, steps: int) -> list[str]:
    """Lines with the number of images, the buckets, and the epochs in ``steps`` optimizer steps."""
    buckets = data.buckets(data.train)
    images = len(data.train)
    seen = sum(len(entries) for entries in buckets.values())
    sizes = ", ".join(f"{w}x{h} ({len(set(entries))})" for (w, h), entries in buckets.items())
    epoch = data.order().steps_per_epoch
    lines = [
        f"data: {images} images, {seen} with repeats, {len(data.held_out)} held out; buckets {sizes}",
        f"order: {epoch} step(s) per epoch at batch size {data.batch_size};"
        f" {steps} steps are {steps / epoch:.1f} epochs",
        *_class_images(data),
        *data.notices,
    ]
    for (w, h), entries in buckets.items():
        if len(entries) < data.batch_size and len(buckets) > 1:
            times = data.batch_size / len(entries)
            lines.append(
                f"WARNING: bucket {w}x{h} has {len(entries)} sample(s), fewer than the batch size: each is"
                f" used {times:.1f} times per epoch, samples of other buckets about once"
            )
    return lines


def _class_images(data: ImageDataModule) -> list[str]:
    if not data.has_prior:
        return []
    if data.class_path is not None:
        return [f"class images: {len(data.class_samples)} in {data.class_path}"]
    return [f"class images: {data.class_images} generated, of {', '.join(map(repr, data.class_prompts))}"]


def size_warnings(data: ImageDataModule, side: int) -> list[str]:
    """Warnings for a resolution far from the backbone's ``side`` in pixels, and for images below the resolution."""
    resolution = data.resolution
    assert resolution is not None
    lines = []
    step = data.bucket_step
    if resolution % step:
        square = resolution // step * step
        lines.append(
            f"WARNING: data.resolution={resolution} is not a multiple of {step}, the step of the buckets: square images"
            f" are trained at {square}x{square}"
        )
    if not side / 2 <= resolution <= side * 2:
        lines.append(
            f"WARNING: data.resolution is {resolution}, but the backbone was trained at {side} pixels and may not learn"
            f" well at other sizes; data.resolution={side} is its own"
        )
    small = [sample for sample in data.train if sample.size[0] * sample.size[1] < 0.8 * resolution**2]
    if small:
        lines.append(
            f"WARNING: {len(small)} of {len(data.train)} images are smaller than data.resolution={resolution}, such as"
            f" {small[0]} ({small[0].size[0]}x{small[0].size[1]}); they are trained at their own size"
        )
    return lines


def caption_summary(data: ImageDataModule, backbone: Backbone) -> list[str]:
    """Lines with the number of captions, and a warning if the longest one exceeds the tokenizer's limit."""
    captions = data.all_prompts()
    longest = max(captions, key=partial(count_tokens, backbone))
    length, limit = count_tokens(backbone, longest), backbone.facts.max_tokens
    lines = [f"captions: {len(captions)} distinct; the longest has {length} tokens, the limit is {limit}"]
    if length > limit:
        lines.append(f"WARNING: captions longer than {limit} tokens are truncated; the longest is {longest!r}")
    return lines
