"""Decode image files to 8-bit RGB with defined conversions; a file that cannot be decoded is an error."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from sdtune.errors import UserError
from sdtune.images.places import Place, as_place

CENTER = (0.5, 0.5)
"""Offset of a center crop, see :func:`resize_and_crop`."""

_HEIC = (".heic", ".heif") if importlib.util.find_spec("pillow_heif") else ()

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", *_HEIC)
"""Supported suffixes of image files, in lower case; HEIC needs pillow-heif."""

# Restrict the formats: Pillow detects them by content, so a .png that contains PostScript would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")

# Pillow's default of 1 MiB refuses PNG files with large color profiles or XMP metadata. The limit of their total,
# MAX_TEXT_MEMORY, stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# Exceptions of Pillow's decoders for damaged files; the decoders do not wrap every failure in OSError.
_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    Image.DecompressionBombError,
)

# Not ImageOps.exif_transpose: it rewrites the EXIF data, which fails for valid images with an unusual tag.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# catch_warnings replaces the filters of the process; concurrent threads could restore them in the wrong order.
_WARNING_FILTERS_LOCK = threading.Lock()


def open_image(path: Path | Place, key: str = "data.path") -> Image.Image:
    """Decode the first frame of ``path`` completely, with its EXIF orientation applied, in mode RGB.

    Transparency is composited on white. 16-bit gray is scaled to 8 bits. CMYK is converted by Pillow's simple formula;
    color profiles are not applied. ``key`` is the config key in errors.

    Raises:
        UserError: not a readable image, or one of more than 179 megapixels (Pillow's limit).
    """
    return open_with_alpha(path, key)[0]


def open_with_alpha(path: Path | Place, key: str = "data.path") -> tuple[Image.Image, Image.Image | None]:
    """The image as :func:`open_image` returns it, and its alpha channel, mode L; None if it has no transparency.

    Raises:
        UserError: as :func:`open_image`.
    """
    with _opened(path, key) as image:
        decoded = _decoded(image)
        return _rgb(decoded), decoded.convert("RGBA").getchannel("A") if _has_alpha(image) else None


def open_alpha(path: Path | Place, key: str = "data.path") -> Image.Image | None:
    """Only the alpha channel of :func:`open_with_alpha`."""
    with _opened(path, key) as image:
        return _decoded(image).convert("RGBA").getchannel("A") if _has_alpha(image) else None


def open_mask(path: Path | Place, key: str) -> Image.Image:
    """Decode a mask to mode L, 255 where it is set.

    Without transparency, the mask is the first color channel. With transparency, it depends on how the file was made:
    a mask that is painted in gray on a transparent layer is composited on black, and of a subject that is cut out in
    its own colors, the alpha channel is the mask.

    Raises:
        UserError: as :func:`open_image`.
    """
    with _opened(path, key) as image:
        decoded = _decoded(image)
        if not _has_alpha(decoded):
            return _rgb(decoded).getchannel("R")
        pixels = np.asarray(decoded.convert("RGBA")).astype(np.uint16)
    colors, alpha = pixels[..., :3], pixels[..., 3]
    if alpha.min() == 255:  # an alpha channel that hides nothing
        return Image.fromarray(colors[..., 0].astype(np.uint8))
    visible = colors[alpha >= 128]
    is_gray = not len(visible) or int((visible.max(1) - visible.min(1)).max()) <= _GRAY_TOLERANCE
    return Image.fromarray((colors[..., 0] * alpha // 255 if is_gray else alpha).astype(np.uint8))


_GRAY_TOLERANCE = 8
"""Largest difference between the color channels of a pixel that counts as gray, of 255."""


def _has_alpha(image: Image.Image) -> bool:
    # Pillow cannot convert 16-bit and floating-point gray with a transparent value to RGBA.
    return image.has_transparency_data and image.mode not in ("F", "I", "I;16", "I;16B", "I;16L")


def _decoded(image: Image.Image) -> Image.Image:
    """All pixels of ``image``, with its EXIF orientation applied."""
    image.load()  # verify() accepts a truncated JPEG
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def image_size(path: Path | Place, key: str = "data.path") -> tuple[int, int]:
    """Read the (width, height) in pixels of the image that :func:`open_image` returns from the header alone.

    The EXIF orientation of a PNG may follow the pixel data and is then ignored here;
    :func:`sdtune.data.folder.check_images` detects this.

    Raises:
        UserError: as :func:`open_image`, for errors in the header.
    """
    with _opened(path, key) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow has already applied the orientation to this size
            return width, height
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def resize_and_crop(
    image: Image.Image,
    size: tuple[int, int],
    offset: tuple[float, float] = CENTER,
    flip: bool = False,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> npt.NDArray[np.uint8]:
    """Scale ``image`` to cover ``size`` and crop the excess.

    Args:
        image: mode RGB.
        size: (width, height) of the result in pixels.
        offset: (x, y), each in [0, 1]: fraction of the excess that is cropped on the left and at the top.
        flip: mirror the crop left to right.
        resample: resampling filter.

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
    # Resize from a fractional box in one pass: resizing to integer pixels first would distort the aspect ratio and
    # shift the crop.
    box = (left, top, left + box_width, top + box_height)
    pixels = np.array(image.resize(size, resample, box=box))
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def frame(
    whole: tuple[int, int], size: tuple[int, int], offset: tuple[float, float], flip: bool
) -> tuple[float, float, float, float, float, float]:
    """SDXL's size and crop conditioning for :func:`resize_and_crop` (Podell et al. 2023, section 2.2).

    Args:
        whole: (width, height) of the image.
        size, offset, flip: as for :func:`resize_and_crop`.

    Returns:
        Height and width of the image, top and left of the crop in the scaled image, height and width of the crop.
    """
    width, height = size
    scale = max(width / whole[0], height / whole[1])
    excess_x, excess_y = whole[0] * scale - width, whole[1] * scale - height
    left = (1 - offset[0] if flip else offset[0]) * excess_x
    return whole[1], whole[0], round(offset[1] * excess_y), round(left), height, width


@contextmanager
def _opened(path: Path | Place, key: str = "data.path") -> Iterator[Image.Image]:
    """Context manager that opens an image and reads its header; decoding failures in its body become a UserError."""
    formats: tuple[str, ...] = _FORMATS
    place = as_place(path)
    if place.file.suffix.lower() in _HEIC:
        from pillow_heif import register_heif_opener

        register_heif_opener()
        formats = ("HEIF",)
    try:
        with _WARNING_FILTERS_LOCK, warnings.catch_warnings():
            # Pillow warns above 89 megapixels, which photographs can have, and raises above 179.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(place.open(), formats=formats)
        with image:
            yield image
    except _FAILURES as error:
        reason = _reason(place, error)
        raise UserError(f"{path} is not a readable image ({reason})", key=key, remedy="remove or replace it") from error


def _reason(place: Place, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's message contains only the path
        is_empty = not (place.length or place.file.stat().st_size)
        return "the file is empty" if is_empty else f"no {', '.join(_FORMATS)} data in it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def _orientation(image: Image.Image) -> int:
    try:
        # Call the base class: PngImageFile.getexif decodes the pixels to find EXIF data after them.
        orientation: int = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except SyntaxError as error:  # Pillow reports "not a TIFF file", since EXIF uses the TIFF structure
        raise UserError("its EXIF data are damaged; save it without EXIF") from error
    return orientation


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's conversion clips at 255, so nearly all pixels would be white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError("its gray values are outside of 0 to 65535; save it with 8 or 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError("its floating-point pixels have no defined white value; save it with 8 or 16 bits")
    if image.has_transparency_data:  # a direct conversion would show the hidden colors of transparent pixels
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
