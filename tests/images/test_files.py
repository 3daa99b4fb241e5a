"""Decoding, orientation, color modes and cropping of images; errors for files that are not readable images."""

from __future__ import annotations

import io
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from sdtune.errors import UserError
from sdtune.images.files import SUFFIXES, image_size, open_alpha, open_image, open_mask, resize_and_crop

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(width: int, height: int) -> Image.Image:
    """Image with a red, green, blue and white quadrant, which differs in every orientation."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix not in (".heic", ".heif", ".jfif")])
def test_every_supported_suffix_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    quadrants(48, 32).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (48, 32))
    assert image_size(path) == (48, 32)
    assert np.abs(np.asarray(image, int) - np.asarray(quadrants(48, 32), int)).mean() < 8


def test_format_is_detected_by_content_not_by_suffix(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "image.png", format="BMP")
    assert np.array_equal(open_image(tmp_path / "image.png"), noise(8, 8))


def test_first_image_of_a_multi_picture_jpeg_is_read(tmp_path: Path) -> None:
    quadrants(32, 16).save(
        tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    assert open_image(tmp_path / "phone.jpg").size == image_size(tmp_path / "phone.jpg") == (32, 16)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, value: int, suffix: str) -> None:
    stored_from_upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    upright = np.asarray(noise(6, 4))
    stored = Image.fromarray(np.ascontiguousarray(stored_from_upright[value](upright)))
    path = tmp_path / f"turned{suffix}"
    stored.save(path, exif=orientation(value), **({"lossless": True} if suffix == ".webp" else {}))
    assert np.array_equal(open_image(path), upright)
    assert image_size(path) == (6, 4)


def test_exif_orientation_of_a_jpeg_is_applied(tmp_path: Path) -> None:
    quadrants(64, 32).save(tmp_path / "phone.jpg", exif=orientation(6))
    image = open_image(tmp_path / "phone.jpg")
    assert image.size == image_size(tmp_path / "phone.jpg") == (32, 64)
    # A rotation by 90 degrees clockwise moves the upper left quadrant to the upper right.
    assert np.abs(np.subtract(image.getpixel((28, 8)), RED)).max() < 15


def test_rotated_image_with_malformed_exif_tag_is_read(tmp_path: Path) -> None:
    exif = orientation(6)
    exif[ExifTags.Base.XResolution] = 2.5
    data = bytearray(exif.tobytes())
    entry = data.index(struct.pack(">HH", ExifTags.Base.XResolution, 5))
    data[entry + 2 : entry + 4] = struct.pack(">H", 7)  # type "bytes" instead of a rational number
    noise(6, 4).save(tmp_path / "malformed.png", exif=bytes(data))
    assert open_image(tmp_path / "malformed.png").size == (4, 6)


def test_exif_orientation_after_the_pixel_data_of_a_png_is_applied(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise(6, 4).save(buffer, "PNG")
    end = buffer.getvalue().index(b"IEND") - 4
    late = png_chunk(b"eXIf", orientation(6).tobytes()[6:])
    (tmp_path / "late.png").write_bytes(buffer.getvalue()[:end] + late + buffer.getvalue()[end:])
    assert open_image(tmp_path / "late.png").size == (4, 6)


def test_size_is_read_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    noise(64, 48).save(path)
    path.write_bytes(path.read_bytes()[:100])
    assert image_size(path) == (64, 48)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 0), WHITE),
        ("LA", (100, 51), (224, 224, 224)),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
    ],
)
def test_gray_and_alpha_are_converted_to_rgb(
    tmp_path: Path, mode: str, color: object, expected: tuple[int, int, int]
) -> None:
    Image.new(mode, (4, 4), color).save(tmp_path / "image.png")
    assert np.asarray(open_image(tmp_path / "image.png")).tolist() == [[list(expected)] * 4] * 4


def test_transparent_palette_and_color_key_become_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=b"\x00\xff")
    palette.save(tmp_path / "palette.gif", transparency=0)
    palette.convert("RGB").save(tmp_path / "key.png", transparency=RED)
    for name in ("palette.png", "palette.gif", "key.png"):
        assert np.asarray(open_image(tmp_path / name)).tolist() == [[list(WHITE), list(BLUE)]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_values_are_scaled_to_8_bits(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 128 * 257], [256, 65534, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep{suffix}", exif=orientation(2))
    expected = np.array([[0, 1, 128], [1, 255, 255]])[:, ::-1]
    image = np.asarray(open_image(tmp_path / f"deep{suffix}"))
    assert np.array_equal(image, np.repeat(expected[:, :, None], 3, axis=2))


def test_32_bit_integers_are_read_as_16_bits_or_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535]], np.int32)).save(tmp_path / "fits.tif")
    assert np.asarray(open_image(tmp_path / "fits.tif")).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    for value in (-1, 65536):
        Image.fromarray(np.array([[0, value]], np.int32)).save(tmp_path / "wide.tif")
        with pytest.raises(UserError, match=r"^data\.path: .*wide\.tif is not a readable image .*0 to 65535"):
            open_image(tmp_path / "wide.tif")


def test_floating_point_image_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"^data\.path: .*float\.tif is not a readable image \(its floating-point"):
        open_image(tmp_path / "float.tif")


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
@pytest.mark.parametrize(
    ("ink", "expected"), [((0, 0, 0, 0), WHITE), ((0, 255, 255, 0), RED), ((0, 0, 0, 255), (0,) * 3)]
)
def test_cmyk_is_converted_to_rgb(
    tmp_path: Path, suffix: str, ink: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    Image.new("CMYK", (8, 8), ink).save(tmp_path / f"print{suffix}")
    image = open_image(tmp_path / f"print{suffix}")
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - expected).max() <= 4


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".tif", ".png"])
def test_first_frame_of_an_animation_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    frames[0].save(tmp_path / f"moving{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(open_image(tmp_path / f"moving{suffix}"), int) - RED).max() <= 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"not an image\n" * 50, "no PNG, JPEG, WEBP, AVIF, BMP, TIFF, GIF data in it"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "no PNG, JPEG"),  # would run Ghostscript
        (b"\x89PNG\r\n\x1a\n", "no PNG, JPEG"),
    ],
)
def test_file_without_image_data_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(data)
    for read in (open_image, image_size):
        with pytest.raises(UserError, match=reason) as caught:
            read(path)
        assert str(caught.value).startswith(f"data.path: {path} is not a readable image (")
        assert str(caught.value).endswith("); remove or replace it")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif"])
def test_truncated_image_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    noise(64, 64).save(path)
    open_image(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"^data\.path: .*cut\{suffix} is not a readable image \([^\n]+\); remove or"):
        open_image(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    for read in (open_image, image_size):
        with pytest.raises(UserError, match=r"^data\.path: .*gone\.png is not .*\(No such file or directory\)"):
            read(tmp_path / "gone.png")


def test_damaged_exif_data_is_refused(tmp_path: Path) -> None:
    noise(6, 4).save(tmp_path / "image.png", exif=b"Exif\x00\x00MM\x00\x0c" + bytes(8))
    for read in (open_image, image_size):
        with pytest.raises(UserError, match=r"image\.png is not a readable image \(its EXIF data are damaged; save"):
            read(tmp_path / "image.png")


def test_large_photograph_is_read_and_a_decompression_bomb_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Pillow warns above its limit and raises above twice the limit."""
    noise(10, 10).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    assert open_image(tmp_path / "image.png").size == image_size(tmp_path / "image.png") == (10, 10)
    assert not recwarn
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 49)
    for read in (open_image, image_size):
        with pytest.raises(UserError, match=r"^data\.path: .*image\.png is not .*decompression bomb"):
            read(tmp_path / "image.png")


def test_png_with_large_metadata_is_read(tmp_path: Path) -> None:
    """Pillow refuses compressed chunks above 1 MiB by default, but reads the same profile in a JPEG."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "x" * 1_500_000, zip=True)
    noise(8, 6).save(tmp_path / "image.png", pnginfo=info, icc_profile=bytes(1_500_000))
    assert open_image(tmp_path / "image.png").size == (8, 6)


def test_jpeg_with_the_suffix_jfif_is_read(tmp_path: Path) -> None:
    noise(8, 6).save(tmp_path / "image.jfif", format="JPEG")
    assert open_image(tmp_path / "image.jfif").size == (8, 6)


def test_heic_image_of_a_phone_is_read(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra heic is not installed")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), RED)).save(tmp_path / "image.heic")
    image = open_image(tmp_path / "image.heic")
    assert image.size == image_size(tmp_path / "image.heic") == (64, 48)
    assert np.abs(np.asarray(image, int) - RED).max() <= 8


def disc(color: tuple[int, ...], background: tuple[int, ...], mode: str) -> Image.Image:
    """A square of 32x32 pixels in the middle of 64x64 pixels."""
    image = Image.new(mode, (64, 64), background)
    image.paste(color, (16, 16, 48, 48))
    return image


@pytest.mark.parametrize(
    ("image", "share"),
    [
        (disc((255,), (0,), "L"), 0.25),
        (disc((255, 255, 255, 255), (0, 0, 0, 0), "RGBA"), 0.25),
        (disc((255, 255, 255, 255), (255, 255, 255, 0), "RGBA"), 0.25),
        (disc((0, 0, 0, 255), (255, 255, 255, 255), "RGBA"), 0.75),
        (disc((255, 0, 0, 255), (0, 0, 0, 255), "RGBA"), 0.25),
        (disc((255, 255, 255, 51), (0, 0, 0, 0), "RGBA"), 0.05),
        (disc((90, 20, 20, 255), (0, 0, 0, 0), "RGBA"), 0.25),
        (disc((200, 255), (0, 0), "LA"), 0.25 * 200 / 255),
        (disc((0, 0, 0, 0), (0, 0, 0, 0), "RGBA"), 0.0),
    ],
    ids=[
        "on black",
        "on a transparent layer",
        "on transparent white",
        "opaque",
        "opaque and red",
        "half transparent",
        "cut out",
        "LA",
        "empty",
    ],
)
def test_transparent_areas_of_a_mask_do_not_count(tmp_path: Path, image: Image.Image, share: float) -> None:
    image.save(tmp_path / "0.mask.png")
    assert np.asarray(open_mask(tmp_path / "0.mask.png", "data.mask")).mean() / 255 == pytest.approx(share, abs=1e-3)


def test_alpha_channel_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.new("RGBA", (6, 4), (0, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.save(tmp_path / "image.png", exif=exif)
    alpha = open_alpha(tmp_path / "image.png")
    assert alpha is not None
    assert alpha.size == (4, 6)
    assert alpha.getpixel((3, 0)) == 0
    noise(6, 4).save(tmp_path / "opaque.png")
    assert open_alpha(tmp_path / "opaque.png") is None


def test_warning_filters_are_restored_after_concurrent_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(8, 8).save(tmp_path / "image.png")
    real_open = Image.open

    def slow_open(*args: Any, **options: Any) -> Image.Image:
        time.sleep(0.002)  # so that the threads overlap
        return real_open(*args, **options)

    monkeypatch.setattr(Image, "open", slow_open)
    original = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(image_size, [tmp_path / "image.png"] * 24))
    assert list(warnings.filters) == original


def test_image_of_the_requested_size_is_unchanged() -> None:
    image = noise(64, 48)
    pixels = resize_and_crop(image, (64, 48))
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert np.array_equal(pixels, image)
    flipped = resize_and_crop(image, (64, 48), flip=True)
    assert flipped.flags.c_contiguous
    assert np.array_equal(flipped, np.asarray(image)[:, ::-1])


@pytest.mark.parametrize(("offset", "start"), [((0.0, 0.0), 0), ((0.5, 0.5), 10), ((1.0, 1.0), 20), ((0.25, 0.9), 5)])
def test_offset_is_the_cropped_fraction_of_the_excess(offset: tuple[float, float], start: int) -> None:
    wide = noise(60, 40)
    assert np.array_equal(resize_and_crop(wide, (40, 40), offset), np.asarray(wide)[:, start : start + 40])
    tall = noise(40, 60)
    swapped = (offset[1], offset[0])
    assert np.array_equal(resize_and_crop(tall, (40, 40), swapped), np.asarray(tall)[start : start + 40])


def test_scaling_keeps_the_aspect_ratio_and_equals_resize_then_crop() -> None:
    image = quadrants(400, 200)
    pixels = resize_and_crop(image, (64, 64), (0.25, 0.5))
    resized = np.asarray(image.resize((128, 64), Image.Resampling.LANCZOS), int)
    assert np.abs(pixels.astype(int) - resized[:, 16:80]).max() <= 1


def test_small_image_is_enlarged_to_cover_the_size() -> None:
    pixels = resize_and_crop(Image.new("RGB", (10, 5), RED), (64, 128))
    assert pixels.shape == (128, 64, 3)
    assert (pixels == RED).all()


def test_crop_has_the_requested_shape_for_all_sizes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height, out_width, out_height = (int(n) for n in rng.integers(1, 99, size=4))
        offset = (float(rng.random()), 1.0)
        shape = resize_and_crop(Image.new("RGB", (width, height)), (out_width, out_height), offset).shape
        assert shape == (out_height, out_width, 3)
