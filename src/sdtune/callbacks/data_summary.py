"""Log a summary of the data before training: images, buckets, order, captions."""

from __future__ import annotations

import itertools
import logging
import time
from typing import ClassVar

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sdtune.data import ImageDataModule
from sdtune.methods.base import Adapter
from sdtune.training.caption_facts import CaptionFacts, caption_facts

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
            captions = caption_summary(caption_facts(data, pl_module.backbone, pl_module.source.tokenizer_folder()))
            for line in (*summary(data, self.steps), *size_warnings(data, pl_module.source.facts.side), *captions):
                log.info(line)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        micro_batch = max(1, data.batch_size // (trainer.accumulate_grad_batches * trainer.world_size))
        if trainer.is_global_zero:
            for line in text_encoder_cost(pl_module, data, micro_batch):
                log.info(line)


def text_encoder_cost(module: Adapter, data: ImageDataModule, micro_batch: int) -> list[str]:
    """A line if the captions are drawn anew, so that the frozen text encoder runs in each step: what that costs."""
    if not data.cache_text or data.caches.text is not None or module.trains("text_encoder"):
        return []
    prompts = list(
        itertools.islice(itertools.cycle(itertools.islice(data.training_prompts(), micro_batch)), micro_batch)
    )
    seconds = []
    for _ in range(3):  # the first is slower
        start = time.perf_counter()
        module.encode_text(prompts).states.sum().item()
        seconds.append(time.perf_counter() - start)
    return [
        "captions are drawn anew for each use, so their embeddings are not cached: the text encoder runs in each step,"
        f" {1000 * min(seconds):.0f} ms per micro-batch"
    ]


def summary(data: ImageDataModule, steps: int) -> list[str]:
    """Lines with the number of images, the buckets, and the epochs in ``steps`` optimizer steps."""
    buckets = data.buckets
    uses = [buckets.uses(number) for number in range(len(buckets.sizes))]
    sizes = ", ".join(f"{w}x{h} ({count})" for (w, h), count in buckets.images_by_size().items())
    epoch = data.order().steps_per_epoch
    lines = [
        f"data: {len(data.train):,} images, {round(sum(uses)):,} with repeats, {len(data.held_out):,} held out;"
        f" buckets {sizes}",
        *_sources(data),
        f"order: {epoch:,} step(s) per epoch at batch size {data.batch_size};"
        f" {steps:,} steps are {steps / epoch:.1f} epochs",
        *(line for source in data.parts.values() for line in _class_images(source)),
        *data.notices,
    ]
    for (w, h), count in zip(buckets.sizes, uses, strict=True):
        if count < data.batch_size and len(uses) > 1:
            times = data.batch_size / count
            lines.append(
                f"WARNING: bucket {w}x{h} has {count:.0f} sample(s), fewer than the batch size: each is"
                f" used {times:.1f} times per epoch, samples of other buckets about once"
            )
    return lines


def _sources(data: ImageDataModule) -> list[str]:
    """A line for each source of a mix: its images, and its share of an epoch."""
    if len(data.parts) == 1:
        return []
    lines = []
    buckets = data.buckets
    fixed = np.concatenate(buckets.fixed)
    total = len(fixed) + sum(group.count for group in buckets.drawn)
    for number, (name, source) in enumerate(data.parts.items()):
        drawn = sum(group.count for group in buckets.drawn if group.stream == name)
        used = int((data.entries.sources[fixed] == number).sum()) + drawn
        weight = "" if source.loss_weight == 1 else f", loss weight {source.loss_weight:g}"
        lines.append(
            f"source {name}: {len(source.train):,} images, {used:,} of {total:,} entries per epoch"
            f" ({used / total:.0%}){weight}"
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
    lines = []
    resolutions = {
        resolution: step
        for source in data.parts.values()
        for resolution, step in zip(source.resolutions.sides, source.resolutions.steps, strict=True)
    }
    for resolution, step in resolutions.items():
        if resolution % step:
            square = resolution // step * step
            lines.append(
                f"WARNING: data.resolution={resolution} is not a multiple of {step}, the step of the buckets: square"
                f" images are trained at {square}x{square}"
            )
        if not side / 2 <= resolution <= side * 2:
            lines.append(
                f"WARNING: data.resolution is {resolution}, but the backbone was trained at {side} pixels and may not"
                f" learn well at other sizes; data.resolution={side} is its own"
            )
    for number, (name, source) in enumerate(data.parts.items()):
        lines += _small_images(source)
        possible = len(source.train) * len(source.resolutions.sides)
        left_out = possible - int((data.entries.sources == number).sum())
        if left_out:
            lines.append(
                f"{f'source {name}: ' if name else ''}{left_out:,} of {possible:,} images at several resolutions are"
                " left out: they are smaller than their buckets there"
            )
    return lines


def _small_images(data: ImageDataModule) -> list[str]:
    resolution, sizes = data.resolutions.sides[0], data.train.sizes
    small = np.flatnonzero(sizes.prod(axis=1) < 0.8 * resolution**2)
    if not len(small):
        return []
    sample = data.train[int(small[0])]
    return [
        f"WARNING: {len(small):,} of {len(data.train):,} images are smaller than data.resolution={resolution}, such as"
        f" {sample} ({sample.size[0]}x{sample.size[1]}); they are trained at their own size"
    ]


def caption_summary(facts: CaptionFacts) -> list[str]:
    """Lines with the number of captions, and a warning if the longest one exceeds the tokenizer's limit."""
    among = "" if facts.is_complete else f" among {facts.counted:,} of {facts.total:,} images"
    lines = [
        f"captions: {facts.distinct:,} distinct{among}; the longest has {facts.longest_tokens} tokens,"
        f" the limit is {facts.limit}"
    ]
    if facts.cut:
        lines.append(
            f"WARNING: captions longer than {facts.limit} tokens are truncated: {facts.cut:,} of"
            f" {facts.distinct:,}{among}; the longest is {facts.longest!r}"
        )
    return lines
