"""Class images for prior preservation (DreamBooth): drawn before training, paired with the subject.

Ruiz et al. 2022, "DreamBooth: fine tuning text-to-image diffusion models for subject-driven generation", section 3.3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from sdtune import streams
from sdtune.data.cache import share
from sdtune.files import replacing
from sdtune.images.files import open_image, resize_and_crop
from sdtune.progress import bar
from sdtune.randomness import generator

DrawImages = Callable[[Sequence[tuple[str, int]]], Iterator[np.ndarray]]
"""(prompt, seed) each -> an image each, uint8 [H, W, 3], by the model before training."""

PLACE = 1 << 32
"""Added to a pair's position it is the place of its class image, so that the two see different noise."""


class ClassImage:
    """An image of the class, drawn by the model before training and kept on disk."""

    repeats = 1

    def __init__(self, path: Path, caption: str, side: int) -> None:
        self.path, self.caption, self.size = path, caption, (side, side)

    def __str__(self) -> str:
        return str(self.path)

    def content(self) -> str:
        """The folders are named by the model that draws and by the prompt, so the path names the content."""
        return hashlib.sha256("/".join(self.path.parts[-3:]).encode()).hexdigest()

    def pixels(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        return resize_and_crop(open_image(self.path), size, offset, flip)


def class_images(folder: Path, prompts: Sequence[str], count: int, side: int) -> list[ClassImage]:
    """The ``count`` images of ``prompts``, by turns, that ``folder`` holds or will hold."""
    keys = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in prompts]
    turns = [number % len(prompts) for number in range(count)]
    return [ClassImage(folder / keys[t] / f"{n:05d}.png", prompts[t], side) for n, t in enumerate(turns)]


def draw_missing(images: Sequence[ClassImage], draw: DrawImages, rank: int, processes: int) -> None:
    """Draw this process's share of the images that are not on disk yet; each is written whole as it comes."""
    # Shared out first: another process may write one of its own while this one looks.
    shared = [int(number) for number in share(map(str, range(len(images))), rank, processes)]
    mine = [number for number in shared if not images[number].path.exists()]
    if not mine:
        return
    wanted = [(images[number].caption, number) for number in mine]
    more = len({image.caption for image in images}) - 1
    others = f" and {more} other prompts" if more else ""
    with bar(f"Drawing images of {images[0].caption!r}{others}", len(mine)) as progress:
        for number, pixels in zip(mine, draw(wanted), strict=True):
            with replacing(images[number].path, sync=False) as partial:
                Image.fromarray(pixels).save(partial, format="PNG")
            progress(1)


def partner(seed: int, count: int, number: int) -> int:
    """Which of ``count`` class images goes with the ``number``-th pair of the run: each once before any twice."""
    epoch, place = divmod(number, count)
    return _permutation(seed, count, epoch)[place]


@lru_cache(maxsize=4)
def _permutation(seed: int, count: int, epoch: int) -> list[int]:
    return [int(i) for i in generator(seed, streams.CLASS_ORDER, epoch).permutation(count)]
