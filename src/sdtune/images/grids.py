"""Write PNG files with metadata, and compose labeled grids of images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sdtune.files import replacing

_MARGIN = 6
_TILE_SIDE = 160  # small images are enlarged to about this side, without smoothing, so that details are visible


def save_png(
    image: np.ndarray | Image.Image, path: Path, settings: dict[str, str] | None = None, *, sync: bool = True
) -> None:
    """Write a PNG atomically, with ``settings`` as text chunks of its metadata, as A1111 and ComfyUI do."""
    info = PngInfo()
    for key, value in (settings or {}).items():
        info.add_itxt(key, value)
    pil_image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with replacing(path, sync=sync) as partial:
        pil_image.save(partial, format="PNG", pnginfo=info)


def grid(
    rows: Sequence[Sequence[np.ndarray]], row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()
) -> Image.Image:
    """Grid of ``rows`` of images (uint8 [H, W, 3], all of one size), with labels at the left and at the top."""
    height, width = rows[0][0].shape[:2]
    scale = max(1, round(_TILE_SIDE / max(height, width)))
    tile_w, tile_h = width * scale + _MARGIN, height * scale + _MARGIN
    font = ImageFont.load_default(size=13)
    left = 120 if any(row_labels) else 0
    top = 62 if any(column_labels) else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * tile_w + _MARGIN, top + len(rows) * tile_h + _MARGIN), "white")
    canvas = ImageDraw.Draw(sheet)
    for c, label in enumerate(column_labels):
        lines = textwrap.wrap(label, max(8, tile_w // 7), max_lines=4, placeholder=" ...")
        canvas.multiline_text((left + _MARGIN + c * tile_w, 2), "\n".join(lines), fill="black", font=font, spacing=1)
    for r, row in enumerate(rows):
        if r < len(row_labels):
            lines = textwrap.wrap(row_labels[r], 16, max_lines=6, placeholder=" ...")
            canvas.multiline_text((4, top + _MARGIN + r * tile_h), "\n".join(lines), fill="black", font=font, spacing=1)
        for c, image in enumerate(row):
            tile = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + _MARGIN + c * tile_w, top + _MARGIN + r * tile_h))
    return sheet
