"""Class images for prior preservation (DreamBooth): generated before training, paired with subject images.

Ruiz et al. 2023, "DreamBooth: fine tuning text-to-image diffusion models for subject-driven generation", section 3.3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from sdtune import streams
from sdtune.data.cache import keys_of_rank
from sdtune.files import mark_used, replacing
from sdtune.images.files import open_image, resize_and_crop
from sdtune.progress import bar
from sdtune.randomness import generator

GenerateImages = Callable[[Sequence[tuple[str, int]]], Iterator[np.ndarray]]
"""Function that generates one image, uint8 [H, W, 3], for each (prompt, seed) with the model's initial weights."""

CLASS_POSITION_OFFSET = 1 << 32
"""Offset of the position of a pair's class image, so that the two images of the pair get different noise."""


class ClassImage:
    """Class image on disk, generated with the initial weights of the model."""

    repeats = 1

    def __init__(self, path: Path, caption: str, side: int) -> None:
        self.path, self.caption, self.size = path, caption, (side, side)

    def __str__(self) -> str:
        return str(self.path)

    def content(self) -> str:
        """Hash of the path, which identifies the content: its folders are named after hashes of model and prompt."""
        return hashlib.sha256("/".join(self.path.parts[-3:]).encode()).hexdigest()

    def pixels(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        return resize_and_crop(open_image(self.path), size, offset, flip)


def class_images(folder: Path, prompts: Sequence[str], count: int, side: int) -> list[ClassImage]:
    """List the ``count`` class images in ``folder``, whether they exist yet or not; ``prompts`` are used in turn."""
    keys = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in prompts]
    turns = [number % len(prompts) for number in range(count)]
    return [ClassImage(folder / keys[t] / f"{n:05d}.png", prompts[t], side) for n, t in enumerate(turns)]


def generate_missing(
    images: Sequence[ClassImage], generate: GenerateImages, rank: int, processes: int, *, batch_size: int
) -> None:
    """Generate this process's share of the missing images; each file is written atomically.

    A batch with a missing image is generated completely: the last bits of an image depend on its batch, and a run that
    was interrupted here must get the same images when it is resumed.

    Args:
        batch_size: batch size of ``generate``.
    """
    # Divide all files, not the missing ones: other processes already write files, so each would see others missing.
    rank_numbers = [int(number) for number in keys_of_rank(map(str, range(len(images))), rank, processes)]
    missing = {number for number in rank_numbers if not images[number].path.exists()}
    for number in set(rank_numbers) - missing:
        mark_used(images[number].path)
    if not missing:
        return
    batches = [rank_numbers[i : i + batch_size] for i in range(0, len(rank_numbers), batch_size)]
    numbers = [number for batch in batches if missing.intersection(batch) for number in batch]
    requests = [(images[number].caption, number) for number in numbers]
    more = len({image.caption for image in images}) - 1
    others = f" and {more} other prompts" if more else ""
    with bar(f"Generating images of {images[0].caption!r}{others}", len(missing)) as progress:
        for number, pixels in zip(numbers, generate(requests), strict=True):
            if number not in missing:
                continue
            with replacing(images[number].path, sync=False) as partial:
                Image.fromarray(pixels).save(partial, format="PNG")
            progress(1)


def class_image_index(seed: int, count: int, number: int) -> int:
    """Index of the class image of pair ``number`` of the run; all ``count`` images are used before any is repeated."""
    epoch, pair_of_epoch = divmod(number, count)
    return _permutation(seed, count, epoch)[pair_of_epoch]


@lru_cache(maxsize=64)
def _permutation(seed: int, count: int, epoch: int) -> list[int]:
    return [int(i) for i in generator(seed, streams.CLASS_ORDER, epoch).permutation(count)]
