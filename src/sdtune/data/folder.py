"""A folder of images and the captions that belong to them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtune.errors import UserError
from sdtune.images.files import SUFFIXES, image_size, open_image

_REPEATS_AND_WORDS = re.compile(r"(-?[0-9]+)_(.*)")
_CHECKING_THREADS = 4

MASK = ".mask.png"
"""Ends the name of the mask that belongs to an image: ``fox.mask.png`` to ``fox.jpg``."""


@dataclass(frozen=True)
class CaptionedImage:
    """One image of a folder.

    ``size`` is (width, height) in pixels, EXIF orientation applied; ``repeats`` (>= 1) is how often an epoch shows it.
    """

    path: Path
    caption: str
    size: tuple[int, int]
    repeats: int = 1


_ASK = 'give one for them all with data.prompt="a photo of ...", or a .txt file beside each'


def read_image_folder(
    path: str | Path, prompt: str | None = None, trigger: str | None = None, key: str = "data.path", ask: str = _ASK
) -> tuple[CaptionedImage, ...]:
    """The images in and below ``path``, in the order of their names, each with its caption.

    An image's caption is the first of these that exists:

    1. a ``.txt`` or ``.caption`` file of its name beside it (an empty file is the empty caption);
    2. its row in a ``metadata.jsonl`` or ``metadata.csv`` with ``file_name``, relative to that file, and ``text`` or
       ``caption``;
    3. the words in the name of the sub-folder that holds it, in kohya's form ``10_sks dog``;
    4. ``prompt``.

    ``key`` and ``ask`` are for the refusal of an image without one. Line breaks in 1 and 2 become spaces. ``trigger``
    is put before a caption that does not begin with it. The number in kohya's form is the image's repeats; in other
    folders it is 1. Links are followed; hidden files, ``__MACOSX`` and masks are skipped. Only headers are read:
    ``check_images`` decodes.

    Raises:
        UserError: no images; an image without a caption, with two of one kind, or with an unreadable header;
            metadata that does not fit the folder; text that is not UTF-8; repeats below 1.
    """
    folder = Path(path).expanduser().absolute()
    # By parts, since paths themselves compare differently between Python versions, and the order decides a run.
    files = sorted(_files(folder), key=lambda file: file.parts) if folder.is_dir() else []
    images = [f for f in files if f.suffix.lower() in SUFFIXES and not f.name.endswith(MASK)]
    if not images:
        raise UserError(f"{_no_images(folder, files)}", key=key)
    kohya = {image: _repeats_and_words(folder, image.parent) for image in images}
    captions = {image: words for image, (_, words) in kohya.items() if words}
    captions |= _metadata_captions(files, images)
    captions |= _sidecar_captions(files, images)
    bare = [image for image in images if image not in captions]
    if prompt is not None:
        captions |= dict.fromkeys(bare, prompt)
    elif bare:
        raise UserError(f"{len(bare)} of {len(images)} images have no caption, the first is {bare[0]}: {ask}", key=key)
    return tuple(
        CaptionedImage(image, _with_trigger(captions[image], trigger), image_size(image), kohya[image][0])
        for image in images
    )


def check_images(images: Iterable[CaptionedImage]) -> None:
    """Decode every image once, so that a damaged one is found before training and not in the middle of it.

    Raises:
        UserError: the first image, in order, that cannot be decoded, or whose size is not the one it was read with.
    """
    with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        for _ in pool.map(_check, images):
            pass


def _check(image: CaptionedImage) -> None:
    size = open_image(image.path).size
    if size != image.size:
        raise UserError(
            f"{image.path} is {size[0]}x{size[1]} pixels and not {image.size[0]}x{image.size[1]}"
            " as its header said (it changed, or its orientation stands behind its pixels): save"
            " it again",
            key="data.path",
        )


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file under ``folder``, but hidden ones and what macOS leaves in archives."""
    real = folder.resolve()
    if real in above:
        raise UserError(f"{folder} links back to a folder around it: remove this link", key="data.path")
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): make it readable", key="data.path") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            yield from _files(entry, (*above, real))
        else:
            yield entry


def _no_images(folder: Path, files: Sequence[Path]) -> str:
    if files:
        counts = Counter(file.suffix.lower() or "without a suffix" for file in files)
        seen = "it holds " + ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
    elif folder.is_dir():
        seen = "it is empty"
    elif folder.exists():
        seen = "it is a file"
    else:
        seen = "it does not exist"
    return f"no images found in {folder}: {seen}; give a folder with {', '.join(SUFFIXES)} files"


def _repeats_and_words(root: Path, folder: Path) -> tuple[int, str]:
    """What kohya's form says in the name of ``folder``; the name of ``root`` itself says nothing."""
    match = None if folder == root else _REPEATS_AND_WORDS.fullmatch(folder.name)
    if match is None:
        return 1, ""
    repeats, words = int(match[1]), match[2].strip()
    if repeats < 1:
        raise UserError(f"{folder} asks for {repeats} repeats: let its name begin with 1_ or more", key="data.path")
    return repeats, words


def _sidecar_captions(files: Sequence[Path], images: Sequence[Path]) -> dict[Path, str]:
    sidecars: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in (".txt", ".caption"):
            sidecars.setdefault(file.with_suffix(""), []).append(file)
    captions = {}
    for image in images:
        beside = sidecars.get(image.with_suffix(""), [])
        if len(beside) > 1:
            raise UserError(
                f"{image} has two captions, {beside[0].name} and {beside[1].name}: remove one", key="data.path"
            )
        if beside:
            captions[image] = _one_line(_text(beside[0]))
    return captions


def _metadata_captions(files: Sequence[Path], images: Sequence[Path]) -> dict[Path, str]:
    known = set(images)
    captions: dict[Path, str] = {}
    tables = [file for file in files if file.name in ("metadata.jsonl", "metadata.csv")]
    for table in tables:
        if table.suffix == ".csv" and table.with_suffix(".jsonl") in tables:
            raise UserError(f"{table.parent} has both metadata.jsonl and metadata.csv: remove one", key="data.path")
        for line, row in _csv_rows(table) if table.suffix == ".csv" else _jsonl_rows(table):
            name, caption = _name_and_caption(row, f"data.path: {table}, line {line}")
            image = table.parent / name
            if image not in known:
                raise UserError(
                    f"{table}, line {line}: there is no image {image}: correct or remove this row", key="data.path"
                )
            if image in captions:
                raise UserError(f"{table}, line {line}: {name} has a row already: remove one", key="data.path")
            captions[image] = _one_line(caption)
    return captions


def _name_and_caption(row: Any, where: str) -> tuple[str, str]:
    """The file name and caption of a metadata row, which may be anything that JSON can say."""
    if isinstance(row, dict):
        captions = [row[column] for column in ("text", "caption") if column in row]
        match row.get("file_name"), captions:
            case str(name), [str(caption)]:
                return name, caption
    raise UserError(f"{where}: a row needs a file_name and either a text or a caption, as strings")


def _jsonl_rows(table: Path) -> Iterator[tuple[int, Any]]:
    # Not splitlines(), which also splits at U+2028 and its like, and JSON strings may hold those.
    for line, text in enumerate(_text(table).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{table}, line {line}: not JSON ({error.msg}): correct this row", key="data.path"
            ) from error
        yield line, row


def _csv_rows(table: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(_text(table), newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{table}, after line {reader.line_num}: {error}: correct this row", key="data.path") from error


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8", key="data.path") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): make it readable", key="data.path") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _with_trigger(caption: str, trigger: str | None) -> str:
    # Whole words only: the trigger "sks" does not begin "sksy dog".
    if not trigger or re.match(rf"{re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}, {caption}" if caption else trigger
