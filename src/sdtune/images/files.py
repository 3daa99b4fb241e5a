"""Image files as 8-bit RGB, every conversion defined here; a file that cannot be decoded is an error."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from sdtune.errors import UserError

CENTRE = (0.5, 0.5)
"""The offset of a crop at the centre, as :func:`resize_and_crop` takes it."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Suffixes of image files, to be compared in lower case."""

# A closed list, since Pillow goes by content: a .png that holds PostScript would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")

# What Pillow's decoders raise on damaged files; they parse bytes and do not wrap every failure in OSError.
_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

# Not ImageOps.exif_transpose, which writes the EXIF anew and so fails on good images with an odd tag.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# catch_warnings swaps a list of the whole process: interleaved threads would leave the filter behind for everybody.
_OPENING = threading.Lock()


def open_image(path: Path, key: str = "data.path") -> Image.Image:
    """The first frame of ``path``, fully decoded, upright by its EXIF orientation, mode RGB.

    Transparency is composited on white. 16-bit grey is scaled to 8 bits. CMYK goes by Pillow's plain formula: colour
    profiles are not applied. ``key`` is the setting that errors name.

    Raises:
        UserError: not a readable image, or one too large to be honest (Pillow's decompression bomb limit).
    """
    with _opened(path, key) as image:
        image.load()  # decodes every pixel, where verify() passes a truncated JPEG
        turn = _UPRIGHT.get(_orientation(image))
        return _rgb(image if turn is None else image.transpose(turn))


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of what ``open_image`` returns, from the header alone.

    A PNG may hold its orientation behind the pixels, where this does not look; ``check_images`` finds those.

    Raises:
        UserError: as ``open_image``, as far as the header shows it.
    """
    with _opened(path) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow has turned this size already
            return width, height
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def resize_and_crop(
    image: Image.Image,
    size: tuple[int, int],
    offset: tuple[float, float] = CENTRE,
    flip: bool = False,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> npt.NDArray[np.uint8]:
    """``image`` scaled to cover ``size``, and what stands over cropped away.

    Args:
        image: mode RGB.
        size: (width, height) of the result in pixels.
        offset: (x, y), each in [0, 1]: the share of the room that is cropped on the left and at the top.
        flip: mirror the crop left to right.
        resample: the filter.

    Returns:
        uint8 [height, width, 3], writable.
    """
    width, height = size
    if image.width * height > image.height * width:
        box_width, box_height = image.height * width / height, float(image.height)
    else:
        box_width, box_height = float(image.width), image.width * height / width
    left = offset[0] * (image.width - box_width)
    top = offset[1] * (image.height - box_height)
    # One pass over a fractional box: a resize to whole pixels first would bend the aspect and shift the crop.
    box = (left, top, left + box_width, top + box_height)
    pixels = np.array(image.resize(size, resample, box=box))
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def frame(
    whole: tuple[int, int], size: tuple[int, int], offset: tuple[float, float], flip: bool
) -> tuple[float, float, float, float, float, float]:
    """Where :func:`resize_and_crop` has a crop from: what SDXL is told of it (Podell et al. 2023, section 2.2).

    Args:
        whole: (width, height) of the image.
        size, offset, flip: as there.

    Returns:
        height and width of the image, top and left of the crop in the scaled image, height and width of the crop.
    """
    width, height = size
    scale = max(width / whole[0], height / whole[1])
    across, down = whole[0] * scale - width, whole[1] * scale - height
    left = (1 - offset[0] if flip else offset[0]) * across
    return whole[1], whole[0], round(offset[1] * down), round(left), height, width


@contextmanager
def _opened(path: Path, key: str = "data.path") -> Iterator[Image.Image]:
    """The image with its header read; whatever fails in here becomes the one line for the user."""
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_FORMATS)
        with image:
            yield image
    except _FAILURES as error:
        reason = _reason(path, error)
        raise UserError(f"{path} is not a readable image ({reason}): remove it or replace it", key=key) from error


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's own words repeat the path and say no more
        return f"no {', '.join(_FORMATS)} data in it" if path.stat().st_size else "the file is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def _orientation(image: Image.Image) -> int:
    try:
        # The base class's method, since the PNG one decodes the pixels to look for EXIF behind them.
        orientation: int = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except SyntaxError as error:  # EXIF has the form of a TIFF file, and "not a TIFF file" would mislead
        raise UserError("its EXIF data are damaged") from error
    return orientation


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255: nearly everything would be white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError("its grey values leave the 16 bits 0 to 65535")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError("floating-point pixels have no agreed white")
    if image.has_transparency_data:  # a plain conversion would show the colours hidden under the transparent parts
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
