"""Prompts and control maps for previews and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdtune.data.datamodule import ImageDataModule


@dataclass(frozen=True)
class PreviewPrompt:
    """A prompt; ``maps`` holds its control map (uint8 [H, W, 3]) where the data has one."""

    prompt: str
    maps: tuple[np.ndarray, ...] = ()


def preview_prompts(
    data: ImageDataModule, prompts: Sequence[str] | None, count: int, size: tuple[int, int]
) -> list[PreviewPrompt]:
    """``prompts``, or the prompts of its training images, at most ``count`` of them.

    With control maps each prompt gets that of a held-out (or else a training) image, at ``size`` (width, height).
    """
    if data.control is None:
        return [PreviewPrompt(prompt) for prompt in prompts or data.shown()[:count]]
    samples = (data.held_out or data.train)[: len(prompts) if prompts else count]
    data.control.prepare(samples)
    maps = [data.control.map(sample, size) for sample in samples]
    texts = prompts or [sample.caption for sample in samples]
    return [PreviewPrompt(text, (maps[i % len(maps)],)) for i, text in enumerate(texts)]
