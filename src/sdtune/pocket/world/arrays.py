"""Training images of pocket's world, rendered once and stored as an array on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdtune import streams
from sdtune.files import replacing
from sdtune.pocket.world.captions import training_caption
from sdtune.pocket.world.scenes import SIDE, draw_scene, training_scene
from sdtune.randomness import generator


def training_images(folder: Path, seed: int, count: int) -> np.ndarray:
    """Training images 0..count-1: uint8 [count, 64, 64, 3], memory-mapped from ``folder``."""
    path = folder / f"images-{seed}-{count}.npy"
    if not path.exists():
        with replacing(path, sync=False) as partial, partial.open("wb") as handle:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, SIDE, SIDE, 3)}
            np.lib.format.write_array_header_1_0(handle, header)
            for index in range(count):
                handle.write(np.asarray(draw_scene(training_scene(seed, index))).tobytes())
    images: np.ndarray = np.load(path, mmap_mode="r")
    return images


def caption(seed: int, index: int) -> str:
    """Caption of training image ``index``."""
    return training_caption(training_scene(seed, index), generator(seed, streams.WORLD_CAPTION, index))
