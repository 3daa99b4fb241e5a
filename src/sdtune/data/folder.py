"""Read a folder of images and their captions."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdtune.data.listing import Listing, count_and_names, list_files
from sdtune.errors import UserError
from sdtune.images.files import SUFFIXES, image_size, open_with_alpha
from sdtune.progress import track

_REPEATS_AND_WORDS = re.compile(r"(-?[0-9]+)_(.*)")
_CHECKING_THREADS = 4

MASK_SUFFIX = ".mask.png"
"""Suffix of mask files: ``fox.mask.png`` is the mask of ``fox.jpg``."""

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")

UNSUPPORTED_IMAGE_REMEDIES = {
    ".heic": "install pillow-heif (extra: heic), or convert them",
    ".heif": "install pillow-heif (extra: heic), or convert them",
    ".jxl": "convert them to .png or .webp",
    ".jp2": "convert them to .png or .webp",
    ".psd": "convert them to .png",
}
"""Remedies for images of unsupported formats, by file suffix."""


@dataclass(frozen=True)
class CaptionedImage:
    """Image file with its caption.

    ``size`` is (width, height) in pixels after EXIF orientation; ``repeats`` (>= 1) is the number of uses per epoch.
    """

    path: Path
    caption: str
    size: tuple[int, int]
    repeats: int = 1


_CAPTION_REMEDY = 'set data.prompt="a photo of ...", or add a .txt file next to each image'


@dataclass(frozen=True)
class ImageFolder:
    """Captioned images of a folder, and lines for the data summary about its unused files."""

    images: tuple[CaptionedImage, ...]
    notices: tuple[str, ...]
    uses_prompt: bool
    """Whether an image has no caption of its own."""


def read_image_folder(
    path: str | Path,
    prompt: str | None = None,
    trigger: str | None = None,
    key: str = "data.path",
    caption_remedy: str = _CAPTION_REMEDY,
    other_roles: Mapping[Path, str] | None = None,
) -> ImageFolder:
    """Read the images in and below ``path``, sorted by path, each with its caption.

    An image's caption is the first of these that exists:

    1. a ``.txt`` or ``.caption`` file with the image's name in the same folder (an empty file is an empty caption);
    2. the image's row in a ``metadata.jsonl`` or ``metadata.csv``, with ``file_name`` (relative to that file) and
       ``text`` or ``caption``;
    3. the words in the name of the image's sub-folder, in kohya's form ``10_sks dog``;
    4. ``prompt``.

    Line breaks in 1 and 2 become spaces. ``trigger`` is put before captions that do not start with it. The number in
    kohya's form is the image's repeats; in other folders it is 1. Masks are not images;
    :func:`sdtune.data.listing.list_files` states which files and folders are read. Only headers are read;
    :func:`check_images` decodes the images.

    Args:
        key: config key of the folder, for errors.
        caption_remedy: remedy for images without a caption.
        other_roles: config key by resolved path of the folders of other settings; they are not read.

    Raises:
        UserError: no images; an image without a caption, with two captions of the same kind, or with an unreadable
            header; invalid metadata; text that is not UTF-8; repeats below 1; a folder that cannot be read.
    """
    folder = Path(path).expanduser().absolute()
    listing = list_files(folder, key, other_roles or {})
    files, images = listing.files, images_of(listing, folder, key)
    with _errors_with_key(key):
        repeats_and_words = {image: _repeats_and_words(folder, image.parent) for image in images}
        captions = {image: words for image, (_, words) in repeats_and_words.items() if words}
        captions |= _metadata_captions(files, images)
        captions |= _sidecar_captions(files, images)
        headers = track("Reading image headers", images, len(images))
        sizes = {image: image_size(image, key) for image in headers}
    uncaptioned = [image for image in images if image not in captions]
    if prompt is not None:
        captions |= dict.fromkeys(uncaptioned, prompt)
    elif uncaptioned:
        raise UserError(
            f"{len(uncaptioned)} of {len(images)} images have no caption, the first is {uncaptioned[0]}",
            key=key,
            remedy=_kohya_parent(folder, key) or caption_remedy,
        )
    return ImageFolder(
        tuple(
            CaptionedImage(image, _with_trigger(captions[image], trigger), sizes[image], repeats)
            for image, (repeats, _) in repeats_and_words.items()
        ),
        (
            *listing.lines(folder),
            *_unused(files, images, folder),
            *_root_name_warning(folder, key),
            *([] if trigger else _empty_captions(images, captions, folder)),
        ),
        uses_prompt=bool(uncaptioned),
    )


def images_of(listing: Listing, folder: Path, key: str) -> list[Path]:
    """Image files of ``listing``, which is that of ``folder``; masks are not images.

    Raises:
        UserError: there are none; names the config ``key``.
    """
    images = [f for f in listing.files if f.suffix.lower() in SUFFIXES and not f.name.endswith(MASK_SUFFIX)]
    if not images:
        raise UserError(
            f"no images found in {folder}: {_contents(folder, listing.files, listing.lines(folder))}",
            key=key,
            remedy=f"set a folder with {', '.join(SUFFIXES)} files",
        )
    return images


def mask_path(image: Path) -> Path:
    """Path of the mask of an image: ``fox.mask.png`` next to ``fox.jpg``."""
    return image.with_name(f"{image.stem}{MASK_SUFFIX}")


@contextmanager
def _errors_with_key(key: str) -> Iterator[None]:
    """Context manager that adds the config ``key`` to each UserError without one."""
    try:
        yield
    except UserError as error:
        if error.key is not None:
            raise
        raise UserError(error.message, key=key, remedy=error.remedy) from error


def _unused(files: Sequence[Path], images: Sequence[Path], folder: Path) -> list[str]:
    """Lines for the data summary about unused files: all except images, masks, their captions and metadata files."""
    stems = {image.with_suffix("") for image in images}
    unused = [f for f in files if f.suffix.lower() not in SUFFIXES and f.name not in METADATA_FILES]
    orphans = [f for f in unused if f.suffix.lower() in CAPTION_SUFFIXES and f.with_suffix("") not in stems]
    other = [f for f in unused if f.suffix.lower() not in CAPTION_SUFFIXES]
    lines = (
        [f"WARNING: captions without an image of the same name: {count_and_names(orphans, folder)}"] if orphans else []
    )
    by_suffix: dict[str, list[Path]] = {}
    for file in other:
        by_suffix.setdefault(file.suffix.lower() or "files without a suffix", []).append(file)
    for suffix, group in sorted(by_suffix.items()):
        hint = UNSUPPORTED_IMAGE_REMEDIES.get(suffix)
        line = f"not read: {suffix}: {count_and_names(group, folder)}"
        lines.append(f"WARNING: {line}; {hint}" if hint else line)
    return lines


def check_images(images: Sequence[CaptionedImage], key: str = "data.path") -> list[str]:
    """Decode every image once, so that damaged images are found before training.

    Args:
        key: config key of their folder, for errors.

    Returns:
        A warning for each image that is transparent everywhere, and therefore trained as plain white.

    Raises:
        UserError: an image cannot be decoded, or its size differs from ``size``; names the first such image.
    """
    with _errors_with_key(key), ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        checked = track("Checking images", pool.map(partial(_check, key=key), images), len(images))
        return [warning for warning in checked if warning is not None]


def _check(image: CaptionedImage, key: str) -> str | None:
    pixels, alpha = open_with_alpha(image.path, key)
    size = pixels.size
    if size != image.size:
        raise UserError(
            f"{image.path} is {size[0]}x{size[1]} pixels, but its header states {image.size[0]}x{image.size[1]}"
            " (it changed, or its EXIF orientation follows the pixel data)",
            remedy="save this image again",
        )
    is_empty = alpha is not None and alpha.getextrema()[1] == 0
    return f"WARNING: {image.path} is transparent everywhere; it is trained as a white image" if is_empty else None


def _contents(folder: Path, files: Sequence[Path], left_out: Sequence[str]) -> str:
    if left_out:
        return "; ".join(left_out)
    if files:
        counts = Counter(file.suffix.lower() or "without a suffix" for file in files)
        return "it contains " + ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
    if folder.is_dir():
        return "it is empty"
    return "it is a file" if folder.exists() else "it does not exist"


def _repeats_and_words(root: Path, folder: Path) -> tuple[int, str]:
    """Repeats and words in the name of ``folder``, in kohya's form; the name of ``root`` does not count."""
    match = None if folder == root else _REPEATS_AND_WORDS.fullmatch(folder.name)
    if match is None:
        return 1, ""
    repeats, words = int(match[1]), match[2].strip()
    if repeats < 1:
        raise UserError(f"{folder}: the folder name sets {repeats} repeats", remedy="use at least 1 in its name")
    return repeats, words


def _kohya_parent(root: Path, key: str) -> str | None:
    """Advice for a ``root`` that is itself an image folder of kohya, such as ``10_sks dog``; None for other names."""
    if _REPEATS_AND_WORDS.fullmatch(root.name) is None:
        return None
    return f"to use the repeats and words in the name {root.name}, set {key}={root.parent}"


def _root_name_warning(root: Path, key: str) -> list[str]:
    advice = _kohya_parent(root, key)
    return [] if advice is None else [f"WARNING: {key}: {_NAMES_COUNT_BELOW}; {advice}"]


_NAMES_COUNT_BELOW = "names count only below this folder"


def is_root_name_warning(line: str) -> bool:
    """Whether ``line`` advises to use the repeats in the name of the folder, as ``data.repeats`` may already do."""
    return _NAMES_COUNT_BELOW in line


def _empty_captions(images: Sequence[Path], captions: Mapping[Path, str], root: Path) -> list[str]:
    """Warning for the data summary about empty captions: usually, a text was intended."""
    empty = [image for image in images if not captions[image]]
    return [f"WARNING: the captions of these images are empty: {count_and_names(empty, root)}"] if empty else []


def _sidecar_captions(files: Sequence[Path], images: Sequence[Path]) -> dict[Path, str]:
    sidecars: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in CAPTION_SUFFIXES:
            sidecars.setdefault(file.with_suffix(""), []).append(file)
    captions = {}
    for image in images:
        matches = sidecars.get(image.with_suffix(""), [])
        if len(matches) > 1:
            raise UserError(
                f"{image} has two captions, {matches[0].name} and {matches[1].name}",
                remedy="remove one",
            )
        if matches:
            captions[image] = _one_line(_text(matches[0]))
    return captions


def _metadata_captions(files: Sequence[Path], images: Sequence[Path]) -> dict[Path, str]:
    known = set(images)
    captions: dict[Path, str] = {}
    tables = [file for file in files if file.name in METADATA_FILES]
    for table in tables:
        if table.suffix == ".csv" and table.with_suffix(".jsonl") in tables:
            raise UserError(f"{table.parent} has both metadata.jsonl and metadata.csv", remedy="remove one")
        for line, row in _csv_rows(table) if table.suffix == ".csv" else _jsonl_rows(table):
            name, caption = _name_and_caption(row, f"{table}, line {line}")
            image = table.parent / name
            if image not in known:
                with_slashes = name.replace("\\", "/")
                remedy = "correct or remove this row"
                if table.parent / with_slashes in known:
                    remedy = f"write file_name with slashes: {with_slashes}"
                raise UserError(f"{table}, line {line}: unknown image {image}", remedy=remedy)
            if image in captions:
                raise UserError(f"{table}, line {line}: duplicate row for {name}", remedy="remove one")
            captions[image] = _one_line(caption)
    return captions


def _name_and_caption(row: Any, where: str) -> tuple[str, str]:
    """Return the file name and the caption of a metadata row, which may be any JSON value."""
    if isinstance(row, dict):
        captions = [row[column] for column in ("text", "caption") if column in row]
        match row.get("file_name"), captions:
            case str(name), [str(caption)]:
                return name, caption
    raise UserError(f"{where}: a row needs a file_name and either a text or a caption, as strings")


def _jsonl_rows(table: Path) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): it also splits at U+2028 and similar characters, which JSON strings may contain.
    for line, text in enumerate(_text(table).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{table}, line {line}: not JSON ({error.msg})", remedy="correct this row") from error
        yield line, row


def _csv_rows(table: Path) -> Iterator[tuple[int, Any]]:
    text = _text(table)
    header = text.partition("\n")[0]
    separator = next((other for other in ";\t" if other in header and "," not in header), None)
    if separator is not None:
        name = "semicolons" if separator == ";" else "tabs"
        raise UserError(f"{table}: the columns are separated by {name}", remedy="save it with commas")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{table}, after line {reader.line_num}: {error}", remedy="correct this row") from error


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text", remedy="save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})", remedy="make it readable") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _with_trigger(caption: str, trigger: str | None) -> str:
    # Match complete words: "sksy dog" and "sks-style" do not start with the trigger "sks".
    if not trigger or re.match(rf"{re.escape(trigger)}(?![\w-])", caption):
        return caption
    return f"{trigger}, {caption}" if caption else trigger
