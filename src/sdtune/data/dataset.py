"""Dataset of training rows: images or cached latents, prompts, crops, flips, control maps and masks."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from sdtune import streams
from sdtune.conditioning import stack_rows
from sdtune.data.buckets import Size
from sdtune.data.cache import EncoderCaches, text_key
from sdtune.data.captions import CaptionRules, CaptionTexts
from sdtune.data.control.base import Control, map_to_tensor
from sdtune.data.entries import Entries
from sdtune.data.order import ScheduledSample
from sdtune.data.prior import CLASS_POSITION_OFFSET, class_image_index
from sdtune.data.samples import Sample, SampleSequence, latent_key, masked, to_tensor
from sdtune.data.views import map_key
from sdtune.errors import UserError
from sdtune.hardware.signals import STOP_SIGNALS
from sdtune.images.files import CENTER, frame
from sdtune.randomness import generator

log = logging.getLogger("sdtune")

Batch = dict[str, Any]
"""Keys of a batch:

* ``prompts``: list[str]; ``step``: int;
* ``positions``: list[int], part of the keys of each sample's random numbers: its position in the global batch (class
  images: plus ``CLASS_POSITION_OFFSET``) or among all validation samples. A list, because reading a tensor back from
  the device would block the step;
* ``frame``: float32 [B, 6], original height and width, top and left of the crop, height and width of the crop in
  pixels (diffusers' ``time_ids`` of SDXL), see :func:`sdtune.images.files.frame`;
* ``pixels``: float32 [B, 3, H, W] in [-1, 1], or, if latents are cached, ``moments``: float32 [B, 2C, h, w];
* ``conditioning``: the text embeddings (:class:`sdtune.conditioning.Conditioning`), if they are cached;
* ``mask``: float32 [B, 1, h, w] in [0, 1], if the loss is masked;
* ``conditions``: inputs of modules beside the denoiser by name, such as ``control``: control maps, float32
  [B, 3, H, W] in [0, 1]; empty if there are none. If they are cached, ``encoded_conditions``: the outputs of
  :meth:`sdtune.methods.base.Adapter.encode_conditions`;
* ``counts``: bool, in validation: False for a batch that only keeps the processes in step.

With class images, B is twice the number of pairs, and there are two more keys: ``subject_count``: int, the number of
subject images, which are the first rows; ``prior_weight``: float, the loss weight of the other rows (class images).

Data of several sources has ``sources``: float32 [B, S], 1 at the source of each subject image, and 0 elsewhere; and, if
their loss weights differ, ``weights``: float32 [B], which replace ``prior_weight``.
"""

Row = dict[str, Any]


@dataclass(frozen=True)
class RowSettings:
    """Settings of the rows of one source; loader processes receive them instead of the data module with its trainer.

    Args:
        rules: from captions to prompts.
        prompt_templates: prompt templates with ``{}`` for the caption.
        caption_dropout_prompt: prompt that replaces a dropped caption.
        masked: whether the samples have a loss mask.
        class_samples: class images; empty without prior preservation.
        conditions: sources of the inputs of modules beside the denoiser, by name, such as ``control``.
        skips_damaged: replace an image that becomes unreadable, see :meth:`ImageDataset.__getitem__`.
        caption_dropout, flip, random_crop, loss_weight, prior_weight: those of
            :class:`~sdtune.data.datamodule.ImageDataModule`.
    """

    rules: CaptionRules
    prompt_templates: Sequence[str]
    caption_dropout_prompt: str
    caption_dropout: float
    flip: bool
    random_crop: bool
    masked: bool
    conditions: Mapping[str, Control]
    class_samples: Sequence[Sample]
    skips_damaged: bool
    loss_weight: float
    prior_weight: float


@dataclass(frozen=True)
class BatchSettings:
    """Settings that the rows of all sources share.

    Args:
        seed: seed of the run.
        batch_size: samples per optimizer step, over all processes and micro-batches.
        factor: downscaling factor of the VAE.
        has_masks: whether rows have a loss mask, because those of a source have.
        is_weighted: whether rows have a loss weight, because those of the sources differ.
        caches: caches of the encoder outputs.
    """

    seed: int
    batch_size: int
    factor: int
    has_masks: bool
    is_weighted: bool
    caches: EncoderCaches


class ImageDataset(Dataset[list[Row]]):
    """Dataset indexed by :class:`ScheduledSample`; an item is a list of the subject row and the class row, if any.

    Args:
        common: settings of all rows.
        sources: settings of the rows of each source.
        samples: samples of each source.
        entries: the entries of all sources.
        training: draw caption, template, caption dropout, flip and crop at random, and add class rows; otherwise use
            the first caption and template, and the center crop.
    """

    def __init__(
        self,
        common: BatchSettings,
        sources: Sequence[RowSettings],
        samples: Sequence[SampleSequence],
        entries: Entries,
        *,
        training: bool,
    ) -> None:
        self.common, self.sources, self.samples, self.entries = common, sources, samples, entries
        self.training = training

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: ScheduledSample) -> list[Row]:
        """Rows of a scheduled entry.

        With ``skips_damaged``, an image that has become unreadable is replaced by another entry of its source and
        size, which is a function of seed, step and position.

        Raises:
            UserError: an image is unreadable.
        """
        source = int(self.entries.sources[index.entry])
        settings, size = self.sources[source], self.entries.size(index.entry)
        rows = [self._subject_row(index)]
        if self.training and settings.class_samples:
            rows.append(self._class_row(settings, size, index.step, index.position))
        if not self.training:
            rows[0]["counts"] = index.counts
        if len(self.sources) > 1:
            for number, row in enumerate(rows):
                row["source"] = torch.zeros(len(self.sources))
                row["source"][source] = 1.0 - number
        return rows

    def _subject_row(self, index: ScheduledSample) -> Row:
        """Row of the entry, or of a replacement of its source and size."""
        settings = self.sources[int(self.entries.sources[index.entry])]
        for attempt in range(_REPLACEMENTS):
            entry = index.entry if not attempt else self._replacement(index, attempt)
            try:
                return self._entry_row(entry, index)
            except UserError as error:
                if not settings.skips_damaged or not self.training:
                    raise
                log.warning("WARNING: step %d: %s; another image replaces it", index.step + 1, error.message)
        return self._entry_row(index.entry, index)

    def _replacement(self, index: ScheduledSample, attempt: int) -> int:
        entries = self.entries
        is_alike = (entries.sizes == entries.sizes[index.entry]).all(axis=1)
        is_alike &= entries.sources == entries.sources[index.entry]
        rng = generator(self.common.seed, f"{streams.REPLACEMENT}{attempt}", index.step, index.position)
        return int(rng.choice(np.flatnonzero(is_alike)))

    def _entry_row(self, entry: int, index: ScheduledSample) -> Row:
        source, row_number = int(self.entries.sources[entry]), int(self.entries.rows[entry])
        samples, size = self.samples[source], self.entries.size(entry)
        texts = samples.texts(row_number)
        return self._row(self.sources[source], samples[row_number], texts, size, index.step, index.position)

    def _class_row(self, settings: RowSettings, size: Size, step: int, position: int) -> Row:
        count = len(settings.class_samples)
        pair_number = step * self.common.batch_size + position
        sample = settings.class_samples[class_image_index(self.common.seed, count, pair_number)]
        texts = CaptionTexts((sample.caption,))
        return self._row(settings, sample, texts, size, step, position + CLASS_POSITION_OFFSET)

    def _row(
        self, settings: RowSettings, sample: Sample, texts: CaptionTexts, size: Size, step: int, position: int
    ) -> Row:
        common, is_subject = self.common, position < CLASS_POSITION_OFFSET
        prompt, flip, offset = self._view(settings, texts, step, position)
        row: Row = {"prompt": prompt, "step": step, "position": position}
        row["frame"] = torch.tensor(frame(sample.size, size, offset, flip), dtype=torch.float32)
        if common.caches.latents is not None:
            row["moments"] = self._moments(sample, size, flip)
        else:
            row["pixels"] = to_tensor(sample.pixels(size, offset, flip))
        if (cache := common.caches.conditions) is not None:
            row["encoded_conditions"] = {
                name: cache.get(map_key(condition, sample, size, flip))[name]
                for name, condition in settings.conditions.items()
            }
        else:
            row["conditions"] = {
                name: map_to_tensor(condition.map(sample, size, offset, flip))
                for name, condition in settings.conditions.items()
            }
        if common.caches.text is not None:
            row["conditioning"] = common.caches.text.get(text_key(prompt))
        if common.has_masks:
            # Images without mask, and class images, count whole.
            ones = torch.ones(1, size[1] // common.factor, size[0] // common.factor)
            has_mask = is_subject and settings.masked
            row["mask"] = _mask(sample, size, offset, flip, common.factor) if has_mask else ones
        if common.is_weighted:
            row["weight"] = torch.tensor(settings.loss_weight * (1.0 if is_subject else settings.prior_weight))
        return row

    def _moments(self, sample: Sample, size: Size, flip: bool) -> Tensor:
        cache = self.common.caches.latents
        assert cache is not None
        try:
            return cache.get(latent_key(sample, size, flip))["moments"]
        except FileNotFoundError:
            sample.pixels(size, CENTER, flip)  # raises the reason for which it was not encoded
            raise

    def _view(
        self, settings: RowSettings, texts: CaptionTexts, step: int, position: int
    ) -> tuple[str, bool, tuple[float, float]]:
        """Prompt, mirroring and crop of a use of a sample."""
        is_subject, seed = position < CLASS_POSITION_OFFSET, self.common.seed
        rules = settings.rules if is_subject else CaptionRules()
        prompt_templates = settings.prompt_templates if is_subject else ("{}",)
        if not self.training:
            return prompt_templates[0].replace("{}", rules.fixed(texts)), False, CENTER
        u_drop, u_flip, x, y, u_template = generator(seed, streams.ROW, step, position).random(5)
        if u_drop < settings.caption_dropout:
            prompt = settings.caption_dropout_prompt if is_subject else ""
        else:
            caption = rules.draw(texts, lambda: generator(seed, streams.CAPTION, step, position))
            prompt = prompt_templates[int(u_template * len(prompt_templates))].replace("{}", caption)
        offset = (float(x), float(y)) if settings.random_crop else CENTER
        return prompt, bool(settings.flip and u_flip < 0.5), offset


_REPLACEMENTS = 8
"""Unreadable images that are replaced in turn before the run stops: a disk may be gone."""


def _mask(sample: Sample, size: Size, offset: tuple[float, float], flip: bool, factor: int) -> Tensor:
    pixel_mask = torch.from_numpy(masked(sample).mask(size, offset, flip)).float()[None] / 255
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
    for key in ("frame", "pixels", "moments", "mask"):
        if key in rows[0]:
            batch[key] = torch.stack([row[key] for row in rows])
    for key in ("conditions", "encoded_conditions"):
        if key in rows[0]:
            batch[key] = {name: torch.stack([row[key][name] for row in rows]) for name in rows[0][key]}
    if "conditioning" in rows[0]:
        batch["conditioning"] = stack_rows([row["conditioning"] for row in rows])
    for name, key in (("sources", "source"), ("weights", "weight")):
        if key in rows[0]:
            batch[name] = torch.stack([row[key] for row in rows])
    if "counts" in rows[0]:
        batch["counts"] = rows[0]["counts"]
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
