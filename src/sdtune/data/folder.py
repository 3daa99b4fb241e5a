"""List a folder of images with their captions, masks and control maps, and make its table in the cache."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdtune.data.control.paired import maps_of_images
from sdtune.data.indexing import file_state, make_table, table_lock
from sdtune.data.listing import Listing, count_and_names, list_files
from sdtune.data.table import MappedTable, StoredImage, TableFacts, TableRow, open_table
from sdtune.errors import UserError
from sdtune.files import mark_used
from sdtune.hardware.processes import is_global_zero
from sdtune.images.files import SUFFIXES
from sdtune.images.places import Place
from sdtune.paths import cache_folder

_REPEATS_AND_WORDS = re.compile(r"(-?[0-9]+)_(.*)")

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
class ImageFolder:
    """Images of a folder, not opened yet, and what the folder says of them.

    Args:
        rows: a row for each image, sorted by path.
        facts: what the table of the folder states about itself, without digest.
    """

    rows: tuple[TableRow, ...]
    facts: TableFacts


def folder_table(
    path: str | Path,
    key: str = "data.path",
    other_roles: Mapping[Path, str] | None = None,
    maps: str | Path | None = None,
    count: int | None = None,
    *,
    rehash: bool = False,
) -> MappedTable:
    """The table of an image folder, in the cache; made or brought up to date if files have changed.

    A file counts as unchanged if its path, size and modification time are. An unchanged folder is listed, but none of
    its files is opened.

    Args:
        rehash: read all images again, although they seem unchanged; once, in the first process.
        path, key, other_roles, maps, count: as for :func:`list_image_folder`.

    Raises:
        UserError: as :func:`list_image_folder`.
    """
    folder = Path(path).expanduser().absolute()
    listing = list_files(folder, key, other_roles or {})
    map_folder = None if maps is None else Path(maps).expanduser().absolute()
    map_states = {} if map_folder is None else list_files(map_folder, "data.control.path", {}).states
    identity = _identity({**listing.states, **map_states}, str(count))
    # One folder for all tables of the same images, whose rows know what was read for another one.
    tables = cache_folder() / "tables" / _short_hash(str(folder))
    selection = [str(maps or ""), count, [str(left_out) for left_out, _ in listing.left_out]]
    file = tables / f"{_short_hash(json.dumps(selection))}.arrow"
    reads_all = rehash and file not in _rehashed and is_global_zero()
    with table_lock(file):
        if reads_all or not _is_up_to_date(file, identity):
            listed = list_image_folder(path, key, other_roles, maps, count, listing)
            others = sorted(tables.glob("*.arrow"), key=lambda other: other != file)
            facts = replace(listed.facts, sources=identity)
            make_table(file, listed.rows, len(listed.rows), facts, earlier=others, rehash=reads_all, sync=False)
        if reads_all:
            _rehashed.add(file)
    mark_used(file)
    return open_table(file, key)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


_rehashed: set[Path] = set()
"""Tables of which this process has read all images."""


def _is_up_to_date(file: Path, identity: str) -> bool:
    try:
        return open_table(file).facts.sources == identity
    except UserError:  # none yet, or one of another version
        return False


def list_image_folder(
    path: str | Path,
    key: str = "data.path",
    other_roles: Mapping[Path, str] | None = None,
    maps: str | Path | None = None,
    count: int | None = None,
    listing: Listing | None = None,
) -> ImageFolder:
    """List the images in and below ``path``, sorted by path, each with its captions, mask and control map.

    The caption of an image is the first of these that exists:

    1. a ``.txt`` or ``.caption`` file with the image's name in the same folder (an empty file is an empty caption); of
       both, the ``.caption`` file is the sentence;
    2. the image's row in a ``metadata.jsonl`` or ``metadata.csv``, with ``file_name`` (relative to that file) and
       ``text`` or ``caption``;
    3. the words in the name of the image's sub-folder, in kohya's form ``10_sks dog``.

    The number in kohya's form is the image's repeats; in other folders it is 1. Masks are not images;
    :func:`sdtune.data.listing.list_files` states which files and folders are read. No image is opened.

    Args:
        key: config key of the folder, for errors.
        other_roles: config key by resolved path of the folders of other settings; they are not read.
        maps: folder of control maps, named like the images.
        count: list only the first images; None: all.
        listing: the files of ``path``, if they are listed already.

    Raises:
        UserError: no images; an image with two rows of metadata or without a map; invalid metadata; text that is not
            UTF-8; repeats below 1; a folder that cannot be read.
    """
    folder = Path(path).expanduser().absolute()
    listing = listing or list_files(folder, key, other_roles or {})
    files, images = listing.files, images_of(listing, folder, key)
    with _errors_with_key(key):
        repeats_and_words = {image: _repeats_and_words(folder, image.parent) for image in images}
        captions = {image: words for image, (_, words) in repeats_and_words.items() if words}
        captions |= _metadata_captions(files, images)
        sidecars, sentences = _sidecar_captions(files, images)
        captions |= sidecars
    images = images[:count]
    map_files = {} if maps is None else maps_of_images(images, maps)
    states = {**listing.states, **{file: file_state(file) for file in map_files.values()}}

    def unread(file: Path | None) -> StoredImage | None:
        return None if file is None or file not in states else StoredImage(Place(file), *states[file])

    rows = tuple(
        TableRow(
            StoredImage(Place(image), *states[image]),
            captions=(captions[image],) if image in captions else (),
            sentences=(sentences[image],) if image in sentences else (),
            repeats=repeats_and_words[image][0],
            mask=unread(mask_path(image)),
            control=unread(map_files.get(image)),
        )
        for image in images
    )
    notices = (*listing.lines(folder), *_unused(files, images, folder), *_root_name_warning(folder, key))
    facts = TableFacts(notices=notices, empty_captions=_empty_captions(images, captions, folder))
    return ImageFolder(rows, facts)


def mask_path(image: Path) -> Path:
    """Path of the mask of ``image``: ``fox.mask.png`` next to ``fox.jpg``."""
    return image.with_name(f"{image.stem}{MASK_SUFFIX}")


def _identity(states: Mapping[Path, tuple[int, int]], selection: str) -> str:
    """Hash of paths, sizes and times, by which an unchanged folder is recognized."""
    digest = hashlib.sha256(selection.encode())
    for file, state in sorted(states.items(), key=lambda item: str(item[0])):
        digest.update(f"{file}|{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def images_of(listing: Listing, folder: Path, key: str) -> list[Path]:
    """Image files in ``listing``, the listing of ``folder``, without masks.

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


def kohya_parent(root: Path, key: str) -> str | None:
    """Advice for a ``root`` that is itself an image folder of kohya, such as ``10_sks dog``; None for other names."""
    if _REPEATS_AND_WORDS.fullmatch(root.name) is None:
        return None
    return f"to use the repeats and words in the name {root.name}, set {key}={root.parent}"


def _root_name_warning(root: Path, key: str) -> list[str]:
    advice = kohya_parent(root, key)
    return [] if advice is None else [f"WARNING: {key}: {_NAMES_COUNT_BELOW}; {advice}"]


_NAMES_COUNT_BELOW = "names count only below this folder"


def is_root_name_warning(line: str) -> bool:
    """Whether ``line`` advises to use the repeats in the name of the folder, as ``data.repeats`` may already do."""
    return _NAMES_COUNT_BELOW in line


def _empty_captions(images: Sequence[Path], captions: Mapping[Path, str], root: Path) -> str:
    """Number and first names of the images whose caption is empty: usually, a text was intended."""
    empty = [image for image in images if not captions.get(image, "-")]
    return count_and_names(empty, root) if empty else ""


def _sidecar_captions(files: Sequence[Path], images: Sequence[Path]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Captions of the images, and the sentences of those that have both a ``.txt`` and a ``.caption`` file."""
    sidecars: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in CAPTION_SUFFIXES:
            sidecars.setdefault(file.with_suffix(""), []).append(file)
    captions, sentences = {}, {}
    for image in images:
        matches = sorted(sidecars.get(image.with_suffix(""), []), key=lambda file: file.suffix.lower() != ".txt")
        if matches:
            captions[image] = _text(matches[0]).strip()
        if len(matches) > 1:
            sentences[image] = _text(matches[1]).strip()
    return captions, sentences


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
            captions[image] = caption.strip()
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
