"""Images with edges, for control maps: bright rectangles on a dark background, at a different position in each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def drawing(number: int, width: int = 40, height: int = 36) -> np.ndarray:
    """Image ``number`` as uint8 [height, width, 3]; not mirror-symmetric."""
    pixels = np.full((height, width, 3), (20, 40, 60), np.uint8)
    left, top = 3 + 2 * number, 4 + number
    pixels[top : top + height // 2, left : left + width // 3] = (230, 200 - 20 * number, 90)
    pixels[top : top + 4, left : left + width // 2] = (90, 230, 40 * number)
    return pixels


def save_drawings(folder: Path, count: int = 5, width: int = 40, height: int = 36) -> Path:
    """Write ``0.png``, ``1.png``, ... with captions to ``folder``."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(drawing(i, width, height)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}", encoding="utf-8")
    return folder
