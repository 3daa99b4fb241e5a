"""Rows of a table of samples from parquet, CSV and JSONL files, ``datasets`` folders and WebDataset tars.

Names of columns are those of the ``datasets`` library and of diffusers' scripts. Bytes are copied only where they
cannot be read in place: out of parquet files, which compress them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdtune.data.indexing import file_state, stored
from sdtune.data.table import StoredImage, TableRow
from sdtune.errors import UserError
from sdtune.files import read_json, replacing
from sdtune.images.files import SUFFIXES
from sdtune.images.places import Place

log = logging.getLogger("sdtune")

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "file_name", "path", "image_path")
CAPTION_COLUMNS = ("captions", "caption", "text", "prompt", "txt")
"""Names by which the columns of images and of captions are found, in this order."""

_MASK_NAMES, _CONTROL_NAMES = ("mask", "mask.png"), ("control", "conditioning_image", "control.png")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a source; None: the first known name that it has.

    Args:
        image: images: bytes, a struct of ``bytes`` and ``path``, or a path relative to the source.
        caption: captions: a text, or a list of texts.
    """

    image: str | None = None
    caption: str | None = None

    def find(self, names: Sequence[str], source: Path) -> tuple[str, str | None]:
        """Columns of the images and of the captions among ``names``; None without captions.

        Raises:
            UserError: a column is missing.
        """
        for setting, name in (("image_column", self.image), ("caption_column", self.caption)):
            if name is not None and name not in names:
                raise UserError(f"{source} has no column {name}", key=setting, remedy=f"use one of {', '.join(names)}")
        image = self.image or next((name for name in IMAGE_COLUMNS if name in names), None)
        if image is None:
            raise UserError(
                f"no column of images in {source}: it has {', '.join(names)}",
                key="image_column",
                remedy="set the name of the column",
            )
        return image, self.caption or next((name for name in CAPTION_COLUMNS if name in names and name != image), None)


@dataclass(frozen=True)
class Shards:
    """Files that image bytes are copied to, next to the table, because they cannot be read in place.

    Args:
        folder: folder of the files.
    """

    folder: Path

    def places(self, source: Path, column: str, values: Callable[[], Iterable[bytes | None]]) -> list[Place | None]:
        """Copy the ``values`` of a column into one file, unless an earlier call has; returns their places.

        Args:
            source: file that they are from.
            values: reads the values of all rows.
        """
        size, modified = file_state(source)
        name = hashlib.sha256(json.dumps([str(source), size, modified, column]).encode()).hexdigest()[:16]
        file = self.folder / f"{source.stem}-{column}-{name}.bin"
        lengths_file = file.with_suffix(".npy")
        if not (file.is_file() and lengths_file.is_file()):
            self._copy(file, lengths_file, values, size)
        lengths = np.load(lengths_file)
        ends = np.cumsum(np.maximum(lengths, 0))
        return [
            None if length < 0 else Place(file, int(end - length), int(length))
            for end, length in zip(ends, lengths, strict=True)
        ]

    def _copy(self, file: Path, lengths_file: Path, values: Callable[[], Iterable[bytes | None]], size: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise UserError(
                f"{self.folder} has {free / 2**30:.1f} GiB free, but about {size / 2**30:.1f} GiB are copied to it",
                key="out",
                remedy="set a file on a larger disk",
            )
        shown = f"{size / 2**30:.1f} GiB" if size > 2**30 else f"{size / 2**20:.1f} MiB"
        log.info("copying about %s of images to %s", shown, file)
        lengths: list[int] = []
        with replacing(file) as partial, partial.open("wb") as sink:
            for value in values():
                lengths.append(-1 if value is None else len(value))
                sink.write(value or b"")
        with replacing(lengths_file) as partial, partial.open("wb") as sink:
            np.save(sink, np.array(lengths, np.int64))


def parquet_rows(file: Path, columns: Columns, shards: Shards) -> Iterator[TableRow]:
    """Rows of a parquet file.

    Raises:
        UserError: the file is not readable, or has no column of images.
    """
    try:
        source = pq.ParquetFile(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{file} is not a parquet file ({str(error).splitlines()[0]})", key="index") from error
    names = source.schema_arrow.names
    image, caption = columns.find(names, file)
    images = {"image": image, "mask": _first(names, _MASK_NAMES), "control": _first(names, _CONTROL_NAMES)}
    places = {
        role: _image_places(source.schema_arrow.field(name).type, file, name, _reader(source, name), shards)
        for role, name in images.items()
        if name is not None
    }
    texts = [name for name in dict.fromkeys((caption, "weights", "sentences", "sentence", "repeats")) if name in names]
    number = 0
    for batch in source.iter_batches(columns=texts, batch_size=4096) if texts else _empty_batches(source):
        for values in batch.to_pylist():
            yield _row(
                {role: found[number] for role, found in places.items()}, values, caption, file.name, f"row {number}"
            )
            number += 1


def _reader(source: pq.ParquetFile, column: str) -> Callable[[], Iterator[Any]]:
    """Function that reads the values of ``column``, a few rows at a time."""

    def read() -> Iterator[Any]:
        for batch in source.iter_batches(columns=[column], batch_size=256):
            yield from batch.column(0).to_pylist()

    return read


def _empty_batches(source: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    yield pa.RecordBatch.from_pylist([{} for _ in range(source.metadata.num_rows)])


def _image_places(
    kind: pa.DataType, file: Path, name: str, values: Callable[[], Iterator[Any]], shards: Shards
) -> list[Place | None]:
    """Places of the images of a column: files that it names, or copies of its bytes."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [None if value is None else Place(_beside(file, value)) for value in values()]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return shards.places(file, name, values)
    fields = [child.name for child in kind] if pa.types.is_struct(kind) else []
    if not {"bytes", "path"} & {*fields}:
        raise UserError(
            f"{file}: the column {name} has values of type {kind}", key="image_column", remedy="use bytes or paths"
        )
    structs = list(values()) if "bytes" not in fields else None
    if structs is not None:
        return [None if value is None else Place(_beside(file, value["path"])) for value in structs]
    copied = shards.places(file, name, lambda: (None if value is None else value["bytes"] for value in values()))
    if all(place is not None for place in copied):
        return copied
    named = (None if value is None or value.get("path") is None else _beside(file, value["path"]) for value in values())
    return [
        place if place is not None or path is None else Place(path) for place, path in zip(copied, named, strict=True)
    ]


def _beside(source: Path, name: str) -> Path:
    return (source.parent / Path(name).expanduser()).absolute()


def _first(names: Sequence[str], known: Sequence[str]) -> str | None:
    return next((name for name in known if name in names), None)


def _row(
    places: Mapping[str, Place | None], values: Mapping[str, Any], caption: str | None, source: str, where: str
) -> TableRow:
    images: dict[str, StoredImage | None] = {
        role: None if place is None else stored(place) for role, place in places.items()
    }
    image = images.get("image")
    if image is None:
        raise UserError(f"{source}, {where} has no image", key="index", remedy="remove this row")
    weights = values.get("weights")
    repeats = values.get("repeats")
    if repeats is not None and (not isinstance(repeats, int) or repeats < 1):
        raise UserError(f"{source}, {where}: got {repeats!r} as repeats", key="index", remedy="use at least 1")
    captions = _texts(values.get(caption) if caption else None, source, where)
    if weights is not None and not _are_weights(weights, len(captions)):
        raise UserError(
            f"{source}, {where}: got {str(weights)[:40]} as weights of {len(captions)} captions",
            key="index",
            remedy="use one number of at least 0 for each caption, not all 0",
        )
    return TableRow(
        image,
        captions=captions,
        weights=tuple(float(weight) for weight in weights or ()),
        sentences=_texts(values.get("sentences") or values.get("sentence"), source, where),
        repeats=repeats or 1,
        source=source,
        mask=images.get("mask"),
        control=images.get("control"),
    )


def _are_weights(values: Any, count: int) -> bool:
    if not isinstance(values, list) or len(values) != count:
        return False
    if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in values):
        return False
    return sum(values) > 0


def _texts(value: Any, source: str, where: str) -> tuple[str, ...]:
    """Texts of a cell: a text, a list of texts, or nothing."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{source}, {where}: got {str(value)[:40]!r} as caption", key="index", remedy="use a text, or a list"
        )
    return tuple(text.strip() for text in texts)


def text_rows(file: Path, columns: Columns) -> Iterator[TableRow]:
    """Rows of a CSV or JSONL file that names image files, relative to its folder.

    Raises:
        UserError: the file is not valid, or has no column of images.
    """
    read = _csv_values if file.suffix.lower() == ".csv" else _jsonl_values
    for line, values in read(file):
        image, caption = columns.find(list(values), file)
        names = {"image": image, "mask": _first(list(values), _MASK_NAMES)}
        names["control"] = _first(list(values), _CONTROL_NAMES)
        places: dict[str, Place | None] = {}
        for role, name in names.items():
            value = values[name] if name is not None else None
            if value is not None and not isinstance(value, str):
                raise UserError(
                    f"{file}, line {line}: got {str(value)[:40]!r} as {name}", key="index", remedy="use a path"
                )
            places[role] = Place(_beside(file, value)) if value else None
        yield _row(places, values, caption, file.name, f"line {line}")


def _csv_values(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                values: dict[str, Any] = {key: value for key, value in row.items() if key is not None}
                repeats = values.get("repeats")
                if isinstance(repeats, str) and re.fullmatch(r"-?[0-9]+", repeats.strip()):
                    values["repeats"] = int(repeats)
                values.pop("weights", None)  # a cell of a CSV file is one caption
                yield reader.line_num, values
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"{file}, after line {reader.line_num}: {error}", key="index", remedy="correct this row"
            ) from error


def _jsonl_values(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    values = json.loads(line)
                    if not isinstance(values, dict):
                        raise UserError(
                            f"{file}, line {number}: not a JSON object", key="index", remedy="correct this row"
                        )
                    yield number, values
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: {error}", key="index", remedy="correct it") from error


def datasets_rows(folder: Path, columns: Columns) -> Iterator[TableRow]:
    """Rows of a data set that ``datasets`` has saved with ``save_to_disk``; its images are read in place.

    Raises:
        UserError: it has several splits, or no column of images.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json", "index").get("splits", [])
        raise UserError(
            f"{folder} has several splits",
            key="index",
            remedy=f"set one of {', '.join(str(folder / s) for s in splits)}",
        )
    files = [folder / str(entry["filename"]) for entry in read_json(folder / "state.json", "index")["_data_files"]]
    number = 0
    for file in files:
        with pa.memory_map(str(file)) as source:
            mapping = source.read_buffer(source.size())
            source.seek(0)
            with pa.ipc.open_stream(source) as reader:
                for batch in reader:
                    for places, values, caption in _mapped_rows(batch, MappedFile(file, mapping), columns):
                        yield _row(places, values, caption, folder.name, f"row {number}")
                        number += 1


@dataclass(frozen=True)
class MappedFile:
    """A memory-mapped Arrow file, which ``datasets`` writes uncompressed.

    Args:
        file: the file.
        content: all of its bytes.
    """

    file: Path
    content: pa.Buffer

    def offset(self, data: pa.Buffer | None) -> int:
        """Offset in the file of ``data``, a buffer of an array that is mapped from it.

        Raises:
            UserError: the file is compressed.
        """
        if data is None or not data.size:
            return 0
        offset = int(data.address - self.content.address)
        if not 0 <= offset <= self.content.size:
            raise UserError(
                f"{self.file} is compressed", key="index", remedy="save the data set again with save_to_disk"
            )
        return offset


def _mapped_rows(
    batch: pa.RecordBatch, mapped: MappedFile, columns: Columns
) -> Iterator[tuple[dict[str, Place | None], dict[str, Any], str | None]]:
    """Places of the images, other values, and name of the captions, of each row of ``batch``."""
    names = batch.schema.names
    image, caption = columns.find(names, mapped.file)
    roles = {"image": image, "mask": _first(names, _MASK_NAMES), "control": _first(names, _CONTROL_NAMES)}
    roles = {role: name for role, name in roles.items() if name is not None}
    places = {role: _mapped_places(batch.column(name), mapped) for role, name in roles.items()}
    others = batch.drop_columns([*roles.values()])
    texts = others.to_pylist() if others.num_columns else [{}] * batch.num_rows
    for number, values in enumerate(texts):
        yield {role: found[number] for role, found in places.items()}, values, caption


def _mapped_places(column: pa.Array, mapped: MappedFile) -> list[Place | None]:
    """Places of the images of a column in the file that it is mapped from, or in files that it names."""
    paths, content = [None] * len(column), column
    if pa.types.is_struct(column.type):
        has_path = column.type.get_field_index("path") >= 0
        paths, content = column.field("path").to_pylist() if has_path else paths, column.field("bytes")
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return [None if path is None else Place(_beside(mapped.file, path)) for path in column.to_pylist()]
    start = mapped.offset(content.buffers()[2])
    offsets = np.frombuffer(content.buffers()[1], np.int64 if pa.types.is_large_binary(content.type) else np.int32)
    offsets = offsets[content.offset : content.offset + len(content) + 1]
    places: list[Place | None] = []
    for index, (is_valid, path) in enumerate(zip(content.is_valid().to_pylist(), paths, strict=True)):
        if is_valid:
            places.append(Place(mapped.file, start + int(offsets[index]), int(offsets[index + 1] - offsets[index])))
        else:
            places.append(None if path is None else Place(_beside(mapped.file, path)))
    return places


def tar_rows(file: Path) -> Iterator[TableRow]:
    """Rows of a WebDataset tar, whose files with the same name before the first dot belong together; read in place.

    ``key.jpg`` (or another image suffix) is the image, ``key.txt`` or ``key.caption`` its caption, ``key.json`` may
    have ``caption``, ``text`` or ``captions``, ``key.mask.png`` is the mask, and ``key.control.png`` the control map.

    Raises:
        UserError: the file is compressed, or not a tar.
    """
    is_tar = False
    try:
        with tarfile.open(file, "r:") as archive:
            is_tar = True
            yield from _rows_of_archive(archive, file)
            archive.fileobj.seek(archive.offset)
            is_complete = archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        reason, remedy = "is not an uncompressed tar", "unpack .gz files with gunzip"
        if is_tar:
            reason, remedy = "is cut off", "copy or make it again"
        raise UserError(f"{file} {reason} ({error})", key="index", remedy=remedy) from error
    if not is_complete:
        raise UserError(f"{file} is cut off (it has no end mark)", key="index", remedy="copy or make it again")


def _rows_of_archive(archive: tarfile.TarFile, file: Path) -> Iterator[TableRow]:
    state = file_state(file)
    group: dict[str, tarfile.TarInfo] = {}
    current = ""
    for member in archive:
        if not member.isfile():  # links could point anywhere
            continue
        folder, _, name = member.name.rpartition("/")
        key, _, suffix = name.partition(".")
        if f"{folder}/{key}" != current:
            yield from _tar_row(archive, file, state, current, group)
            current, group = f"{folder}/{key}", {}
        group[suffix.lower()] = member
    yield from _tar_row(archive, file, state, current, group)


def _tar_row(
    archive: tarfile.TarFile, file: Path, state: tuple[int, int], key: str, group: Mapping[str, tarfile.TarInfo]
) -> Iterator[TableRow]:
    def image_of(suffix: str | None) -> StoredImage | None:
        if suffix is None:
            return None
        member = group[suffix]
        return stored(Place(file, member.offset_data, member.size), state)

    suffix = next((name for name in group if f".{name}" in SUFFIXES), None)
    image = image_of(suffix)
    if image is None:
        return
    values: dict[str, Any] = {}
    for name in ("json", "caption", "txt"):
        if name in group:
            values |= _texts_of_member(archive, group[name], file, is_json=name == "json")
    caption = _first(list(values), ("txt", *CAPTION_COLUMNS))
    yield TableRow(
        image,
        captions=_texts(values.get(caption) if caption else None, file.name, key),
        source=file.name,
        mask=image_of("mask.png" if "mask.png" in group else None),
        control=image_of("control.png" if "control.png" in group else None),
    )


def _texts_of_member(archive: tarfile.TarFile, member: tarfile.TarInfo, file: Path, *, is_json: bool) -> dict[str, Any]:
    """Values of a JSON object, or the text of a caption as ``txt``."""
    content = archive.extractfile(member)
    assert content is not None
    try:
        text = content.read().decode("utf-8-sig")
        values = json.loads(text) if is_json else {"txt": text}
    except ValueError as error:
        raise UserError(f"{file}, {member.name}: {error}", key="index", remedy="correct this file") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}, {member.name}: not a JSON object", key="index", remedy="correct this file")
    return values
