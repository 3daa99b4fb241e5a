"""Prompts and control maps for preview images and evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sdtune.data.datamodule import ImageDataModule
from sdtune.data.samples import Sample


@dataclass(frozen=True)
class PreviewPrompt:
    """Prompt of a preview; ``conditions`` has a ``control`` map, uint8 [H, W, 3], if the data has control maps."""

    prompt: str
    conditions: Mapping[str, np.ndarray] = field(default_factory=dict)


def preview_prompts(
    data: ImageDataModule, prompts: Sequence[str] | None, count: int, size: tuple[int, int]
) -> list[PreviewPrompt]:
    """Preview prompts: ``prompts``, or at most ``count`` prompts of the data.

    If the data has control maps, each prompt gets the map of a held-out image at ``size`` (width, height), used in turn
    if there are more prompts than images; default prompts are the captions of these images. Without held-out images,
    training images are used.
    """
    if data.control is None:
        return [PreviewPrompt(prompt) for prompt in prompts or itertools.islice(data.training_prompts(), count)]
    samples = list((data.held_out or data.train).first(len(prompts) if prompts else count))
    data.control.prepare(samples)
    maps = [data.control.map(sample, size) for sample in samples]
    texts = prompts or [sample.caption for sample in samples]
    return [PreviewPrompt(text, {"control": maps[i % len(maps)]}) for i, text in enumerate(texts)]


def first_images(data: ImageDataModule, count: int) -> list[tuple[ImageDataModule, Sample]]:
    """The first training images, at most ``count``, of all sources in turn, each with its source."""
    parts = [[(part, sample) for sample in part.train.first(count)] for part in data.parts.values()]
    in_turn = (image for images in itertools.zip_longest(*parts) for image in images if image is not None)
    return list(itertools.islice(in_turn, count))
