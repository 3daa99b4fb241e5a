"""Table of samples: a memory-mapped Arrow file with the place, facts and captions of each image.

Processes that map the same file share its pages, so a million rows cost each of them little memory. The format is
Arrow IPC ("Feather V2"); a row names bytes in other files, which the table does not contain.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sdtune.data.captions import CaptionTexts
from sdtune.errors import UserError
from sdtune.files import replacing
from sdtune.images.places import Place

ROWS_PER_BATCH = 65_536
"""Rows of each record batch but the last: a row number divided by it gives the batch."""

_VERSION = 1
_METADATA = b"sdtune"

_STORED_IMAGE = pa.struct(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64()),
        pa.field("file_bytes", pa.int64(), nullable=False),
        pa.field("modified", pa.int64(), nullable=False),
        pa.field("sha256", pa.binary(32)),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("transparent", pa.bool_(), nullable=False),
        pa.field("blank", pa.bool_(), nullable=False),
        pa.field("problem", pa.string()),
    ]
)

SCHEMA = pa.schema(
    [
        pa.field("image", _STORED_IMAGE, nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("weights", pa.list_(pa.float32())),
        pa.field("sentences", pa.list_(pa.string())),
        pa.field("repeats", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("mask", _STORED_IMAGE),
        pa.field("control", _STORED_IMAGE),
    ]
)


@dataclass(frozen=True)
class StoredImage:
    """An image, mask or control map that a table names, with what was read from it when the table was made.

    Args:
        place: where its bytes are.
        file_bytes: size in bytes.
        modified: modification time of the file in nanoseconds since the epoch.
        sha256: hash of the bytes; None if they cannot be read.
        width, height: in pixels, after EXIF orientation; 0 if the image is damaged.
        transparent: whether it has transparency.
        blank: whether an image is transparent everywhere, or a mask black everywhere.
        problem: why it cannot be decoded; None if it can.
    """

    place: Place
    file_bytes: int
    modified: int
    sha256: bytes | None = None
    width: int = 0
    height: int = 0
    transparent: bool = False
    blank: bool = False
    problem: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    def unchanged(self, key: str) -> Place:
        """The place, after checking that its bytes are still those that the table knows.

        Where the file has another time, as after a copy, the bytes are compared by their hash.

        Raises:
            UserError: the file has changed; the message names ``key``.
        """
        try:
            status = self.place.file.stat()
            has_size = self.place.is_part or status.st_size == self.file_bytes
            if (status.st_mtime_ns == self.modified and has_size) or self._has_hash():
                return self.place
        except OSError as error:
            reason = f"{self.place} cannot be read ({error.strerror or error})"
            raise UserError(reason, key=key, remedy="restore it, or index again") from error
        raise UserError(
            f"{self.place} has changed since it was indexed",
            key=key,
            remedy="run sdtune index again; with data=folder start again",
        )

    def _has_hash(self) -> bool:
        return hashlib.sha256(self.place.read()).digest() == self.sha256

    def content(self) -> str:
        """What the bytes mean for a training."""
        return f"{self.sha256.hex() if self.sha256 else None}|{self.width}x{self.height}|{self.problem is not None}"

    def key(self) -> str:
        """What identifies the bytes without reading them: place, size and time."""
        file, offset, length = self.place
        return f"{file}|{offset}|{length}|{self.file_bytes}|{self.modified}"


@dataclass(frozen=True)
class TableRow:
    """A row: an image with what its source says about it. Settings of a training are applied when it is read.

    Args:
        image: the image.
        captions: alternative captions; a text may have several lines. Empty: the source has none for this image.
        weights: probability of each caption, relative to the others; empty: equal.
        sentences: alternative descriptions in sentences, beside captions of tags.
        repeats: uses per epoch that the source asks for, as kohya's folder name ``10_name``; at least 1.
        source: name of the source.
        mask, control: loss mask and control map; None if the source has none.
    """

    image: StoredImage
    captions: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    sentences: tuple[str, ...] = ()
    repeats: int = 1
    source: str = ""
    mask: StoredImage | None = None
    control: StoredImage | None = None

    def contents(self) -> tuple[bytes, bytes, bytes]:
        """What the image with its captions, the mask and the control map mean for a training, without their places."""
        texts = json.dumps([self.captions, self.weights, self.sentences, self.repeats])
        return f"{self.image.content()}|{texts}\n".encode(), _content(self.mask), _content(self.control)


def _content(image: StoredImage | None) -> bytes:
    return b"-\n" if image is None else f"{image.content()}\n".encode()


@dataclass(frozen=True)
class TableFacts:
    """What a table states about itself.

    Args:
        digest, mask_digest, control_digest: hashes of the contents of all rows (:meth:`TableRow.contents`), in order.
        sources: what the table was made from; the same text means the same sources.
        notices: lines for the data summary.
        empty_captions: number and first names of the images whose caption is empty; an empty text if there are none.
    """

    digest: str = ""
    mask_digest: str = ""
    control_digest: str = ""
    sources: str = ""
    notices: tuple[str, ...] = ()
    empty_captions: str = ""


class MappedTable:
    """A table file, memory-mapped; rows are read when they are asked for.

    Args:
        file: path of the table.

    Raises:
        UserError: the file is missing or is not a table of sdtune.
    """

    def __init__(self, file: Path, key: str = "data.path") -> None:
        remedy = "set the file that sdtune index has written"
        if not file.is_file():
            raise UserError(f"{file} does not exist", key=key, remedy=remedy)
        try:
            with pa.ipc.open_file(pa.memory_map(str(file))) as reader:
                metadata = (reader.schema.metadata or {}).get(_METADATA, b"")
                self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
                is_table = bool(metadata) and reader.schema.remove_metadata().equals(SCHEMA)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{file} is not a table of samples", key=key, remedy=remedy) from error
        if not is_table:
            raise UserError(
                f"{file} is not a table of this version of sdtune", key=key, remedy="make it again with sdtune index"
            )
        self.file = file
        values = json.loads(metadata)
        facts = {name: values[name] for name in TableFacts.__dataclass_fields__}
        self.facts = TableFacts(**{**facts, "notices": tuple(facts["notices"])})
        self._arrays: dict[tuple[str, ...], list[pa.Array]] = {}
        self._length: int = sum(batch.num_rows for batch in self.batches)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.file, self.facts)

    def __len__(self) -> int:
        return self._length

    def row(self, number: int) -> TableRow:
        """Row ``number``."""
        texts = self.texts_of(number)
        image = self.image(number, "image")
        assert image is not None
        return TableRow(
            image,
            texts.captions,
            texts.weights,
            texts.sentences,
            repeats=self._value(number, "repeats"),
            source=self._value(number, "source"),
            mask=self.image(number, "mask"),
            control=self.image(number, "control"),
        )

    def image(self, number: int, column: str) -> StoredImage | None:
        """The ``image``, ``mask`` or ``control`` of row ``number``; None if it has none."""
        batch, offset = divmod(number, ROWS_PER_BATCH)
        if not self.batches[batch].column(column)[offset].is_valid:
            return None
        return stored_image({name: self._value(number, column, name) for name in _STORED_FIELDS}, self.file.parent)

    def texts_of(self, number: int) -> CaptionTexts:
        """The captions of row ``number``."""
        captions, weights, sentences = (self._value(number, name) for name in ("captions", "weights", "sentences"))
        return CaptionTexts(tuple(captions), tuple(weights or ()), tuple(sentences or ()))

    def _value(self, number: int, *names: str) -> Any:
        batch, offset = divmod(number, ROWS_PER_BATCH)
        # Reading a whole struct takes twenty times as long as reading its fields from arrays that are at hand.
        if names not in self._arrays:
            columns = [batch.column(names[0]) for batch in self.batches]
            self._arrays[names] = [c.field(name) for c in columns for name in names[1:]] or columns
        return self._arrays[names][batch][offset].as_py()

    def image_numbers(self, column: str, name: str) -> npt.NDArray[np.int64]:
        """A number or truth value of each row's ``image``, ``mask`` or ``control``, int64 [N]; 0 without such an image.

        Args:
            column: ``image``, ``mask`` or ``control``.
            name: field of :class:`StoredImage`.
        """
        parts = []
        for batch in self.batches:
            values = batch.column(column).field(name).to_numpy(zero_copy_only=False)
            present = batch.column(column).is_valid().to_numpy(zero_copy_only=False)
            parts.append(np.where(present, values, 0).astype(np.int64))
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def has(self, column: str, name: str | None = None) -> npt.NDArray[np.bool_]:
        """Whether ``column`` of each row has a value, or its field ``name``, bool [N]."""
        parts = []
        for batch in self.batches:
            present = batch.column(column).is_valid().to_numpy(zero_copy_only=False)
            if name is not None:
                present = present & batch.column(column).field(name).is_valid().to_numpy(zero_copy_only=False)
            parts.append(present)
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def is_in_file(self, files: Collection[str]) -> npt.NDArray[np.bool_]:
        """Whether the image of each row is in one of ``files``, bool [N]."""
        base = self.file.parent
        names = {name for file in files for name in (file, os.path.relpath(file, base))}
        value_set = pa.array(sorted(names), pa.string())
        parts = [
            pc.is_in(batch.column("image").field("file"), value_set).to_numpy(zero_copy_only=False)
            for batch in self.batches
        ]
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def repeats(self) -> npt.NDArray[np.int64]:
        """Repeats of each row, int64 [N]."""
        parts = [batch.column("repeats").to_numpy().astype(np.int64) for batch in self.batches]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def every_texts(self) -> Iterator[CaptionTexts]:
        """The captions of each row, in order; faster than row by row."""
        for batch in self.batches:
            for first in range(0, batch.num_rows, _TEXTS_AT_ONCE):
                columns = [
                    batch.column(name)[first : first + _TEXTS_AT_ONCE].to_pylist()
                    for name in ("captions", "weights", "sentences")
                ]
                for values in zip(*columns, strict=True):
                    yield CaptionTexts(*(tuple(value or ()) for value in values))

    def text_counts(self, column: str) -> npt.NDArray[np.int64]:
        """Number of captions, or sentences, of each row, int64 [N]."""
        parts = [batch.column(column).value_lengths().fill_null(0).to_numpy() for batch in self.batches]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


_TEXTS_AT_ONCE = 1024
_STORED_FIELDS = [field.name for field in _STORED_IMAGE]


def _reopened(file: Path, facts: TableFacts) -> MappedTable:
    """The table in ``file``, in a process that loads images.

    Raises:
        UserError: another command has replaced the table.
    """
    table = open_table(file)
    if table.facts != facts:
        raise UserError(f"{file} was replaced during the training", key="data.path", remedy="start the training again")
    return table


def open_table(file: Path, key: str = "data.path") -> MappedTable:
    """The table in ``file``; jobs of a sweep in one process share it, unless the file has changed.

    Raises:
        UserError: as :class:`MappedTable`.
    """
    try:
        state = file.stat()
    except OSError:
        return MappedTable(file, key)
    # Not the modification time, which a use updates for sdtune cache; a new table is a new file.
    return _opened_table(file, key, state.st_dev, state.st_ino, state.st_size)


@lru_cache(maxsize=8)
def _opened_table(file: Path, key: str, *state: int) -> MappedTable:
    return MappedTable(file, key)


def stored_image(values: Mapping[str, Any], base: Path) -> StoredImage:
    """Image of the values in a table whose folder is ``base``."""
    others = {name: value for name, value in values.items() if name not in ("file", "offset", "length")}
    return StoredImage(Place(base / values["file"], values["offset"], values["length"]), **others)


def _image_values(image: StoredImage | None, base: Path) -> dict[str, Any] | None:
    """Values of a :class:`StoredImage` for the table; files below the folder of the table are named relative to it."""
    if image is None:
        return None
    file, offset, length = image.place
    name = str(file.relative_to(base)) if file.is_relative_to(base) else str(file)
    others = {key: getattr(image, key) for key in _STORED_NAMES}
    return {"file": name, "offset": offset, "length": length, **others}


_STORED_NAMES = [name for name in asdict(StoredImage(Place(Path()), 0, 0)) if name != "place"]


def record_batch(rows: Sequence[TableRow], base: Path) -> pa.RecordBatch:
    """Rows as a record batch of :data:`SCHEMA`.

    Args:
        base: folder of the table.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for row in rows:
        for name in ("image", "mask", "control"):
            columns[name].append(_image_values(getattr(row, name), base))
        columns["captions"].append(row.captions)
        columns["weights"].append(row.weights or None)
        columns["sentences"].append(row.sentences or None)
        columns["repeats"].append(row.repeats)
        columns["source"].append(row.source)
    return pa.record_batch([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def write_table(file: Path, batches: Iterable[pa.RecordBatch], facts: TableFacts, *, sync: bool = True) -> None:
    """Write a table atomically.

    Args:
        file: path of the table; files below its folder must be named relative to it in ``batches``.
        batches: rows in batches of any size (:func:`record_batch`).
        facts: what the table states about itself.
        sync: False for a file that can be made again.
    """
    metadata = json.dumps({"version": _VERSION, **asdict(facts)}).encode()
    schema = SCHEMA.with_metadata({_METADATA: metadata})
    with (
        replacing(file, sync=sync) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        pending: list[pa.RecordBatch] = []
        count = 0
        for batch in batches:
            pending.append(batch)
            count += batch.num_rows
            while count >= ROWS_PER_BATCH:
                merged = pa.Table.from_batches(pending).combine_chunks()
                writer.write_table(merged.slice(0, ROWS_PER_BATCH), max_chunksize=ROWS_PER_BATCH)
                pending = merged.slice(ROWS_PER_BATCH).to_batches()
                count -= ROWS_PER_BATCH
        if count:
            writer.write_table(pa.Table.from_batches(pending).combine_chunks(), max_chunksize=ROWS_PER_BATCH)
