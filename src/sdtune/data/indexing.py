"""Make a table of samples: read each image once, with all cores; what was read before is not read again."""

from __future__ import annotations

import hashlib
import itertools
import logging
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from sdtune.data.table import (
    MappedTable,
    StoredImage,
    TableFacts,
    TableRow,
    open_table,
    record_batch,
    stored_image,
    write_table,
)
from sdtune.errors import UserError
from sdtune.hardware.threads import usable_cores
from sdtune.images.files import open_image, open_mask, open_with_alpha
from sdtune.images.places import Place
from sdtune.progress import bar

log = logging.getLogger("sdtune")

ImageRole = Literal["image", "mask", "control"]
_ROLES: tuple[ImageRole, ...] = ("image", "mask", "control")

_ROWS_AT_ONCE = 1024
"""Rows that are read between two files of the journal."""

_WAITED = 2.0
"""Seconds after which a process says that it waits for another one that makes the same table."""


def stored(place: Place, state: tuple[int, int] | None = None) -> StoredImage:
    """An image that was not read yet.

    Args:
        place: where its bytes are.
        state: size in bytes and modification time in nanoseconds of the file; None: read them.
    """
    size, modified = state or file_state(place.file)
    return StoredImage(place, size if place.length is None else place.length, modified)


def file_state(file: Path) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds of ``file``; zeros if there is none."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def make_table(
    file: Path,
    rows: Iterable[TableRow],
    count: int,
    facts: TableFacts,
    *,
    earlier: Sequence[Path] = (),
    rehash: bool = False,
    sync: bool = True,
    title: str = "Reading images",
) -> MappedTable:
    """Read the images, masks and control maps of ``rows``, and write the table to ``file``.

    Images whose place, size and time are in the table that ``file`` already holds are not read again. A journal next to
    it keeps what an interrupted call has read. Damaged images become rows with a ``problem``.

    Args:
        file: path of the table; the caller holds :func:`table_lock`.
        rows: rows with images that were not read yet (:func:`stored`).
        count: number of rows.
        facts: what the table states about itself; its digests are computed.
        earlier: other tables that know images; those of the first count in doubt.
        rehash: read every image, although it seems unchanged.
        sync: False for a table that can be made again.
        title: text of the progress bar.
    """
    journal = file.with_name(f"{file.name}.journal")
    segments = sorted(journal.glob("*.arrow"))
    tables = dict.fromkeys((file, *earlier, *segments))
    batches_known = [] if rehash else [batch for table in tables for batch in _batches_of_table(table)]
    known = KnownImages(batches_known, file.parent)
    digests, batches, read_now = [hashlib.sha256() for _ in _ROLES], [], 0
    with bar(title, count) as progress, ThreadPoolExecutor(usable_cores()) as pool:
        iterator = iter(rows)
        while chunk := list(itertools.islice(iterator, _ROWS_AT_ONCE)):
            read = list(pool.map(partial(_read_row, known=known), chunk))
            for digest, contents in zip(digests, zip(*(row.contents() for row, _ in read), strict=True), strict=True):
                digest.update(b"".join(contents))
            batches.append(record_batch([row for row, _ in read], file.parent))
            read_now += sum(is_new for _, is_new in read)
            if any(is_new for _, is_new in read):
                number = len(segments) + len(batches)
                write_table(journal / f"{number:06d}.arrow", batches[-1:], TableFacts(), sync=False)
            progress(len(chunk))
    if batches_known:
        log.info("read %s of %s images; the others are unchanged", f"{read_now:,}", f"{count:,}")
    image, mask, control = (digest.hexdigest() for digest in digests)
    write_table(file, batches, replace(facts, digest=image, mask_digest=mask, control_digest=control), sync=sync)
    shutil.rmtree(journal, ignore_errors=True)
    return open_table(file)


def _read_row(row: TableRow, known: KnownImages) -> tuple[TableRow, bool]:
    """``row`` with what is read from its images, and whether one was read now."""
    read: dict[str, Any] = {}
    is_new = False
    for role in _ROLES:
        image: StoredImage | None = getattr(row, role)
        if image is not None:
            known_image = known.find(image, role)
            is_new = is_new or known_image is None
            read[role] = known_image or read_image(image, role)
    return replace(row, **read), is_new


def read_image(image: StoredImage, role: ImageRole) -> StoredImage:
    """Hash and decode ``image``; a failure becomes its ``problem``."""
    try:
        digest = hashlib.sha256(image.place.read()).digest()
    except OSError as error:
        return replace(image, problem=f"cannot be read ({error.strerror or error})")
    try:
        return replace(image, sha256=digest, **_decoded(image.place, role))
    except UserError as error:
        return replace(image, sha256=digest, problem=error.message.removeprefix(f"{image.place} "))


def _decoded(place: Place, role: ImageRole) -> dict[str, Any]:
    if role == "mask":
        mask = open_mask(place, "data.mask")
        return {"width": mask.width, "height": mask.height, "blank": mask.getextrema()[1] == 0}
    if role == "control":
        control_map = open_image(place, "data.control.path")
        return {"width": control_map.width, "height": control_map.height}
    pixels, alpha = open_with_alpha(place)
    is_blank = alpha is not None and alpha.getextrema()[1] == 0
    return {"width": pixels.width, "height": pixels.height, "transparent": alpha is not None, "blank": is_blank}


class KnownImages:
    """What earlier tables say of images, found by place, size and time.

    Args:
        batches: record batches of tables.
        base: folder of the new table, to which names in ``batches`` are relative.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], base: Path) -> None:
        self._base = base
        self._columns = [batch.column(role) for batch in batches for role in _ROLES]
        roles = [role for _ in batches for role in _ROLES]
        # Arrays: a list of a million tuples takes ten times as much memory.
        hashes, numbers, offsets = array("Q"), array("i"), array("i")
        for number, (column, role) in enumerate(zip(self._columns, roles, strict=True)):
            for offset in np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False)).tolist():
                hashes.append(_hash(stored_image(column[offset].as_py(), base), role))
                numbers.append(number)
                offsets.append(offset)
        self._hashes = np.array(hashes, np.uint64)
        places = np.stack([np.array(numbers, np.int32), np.array(offsets, np.int32)], axis=1)
        order = np.argsort(self._hashes, kind="stable")
        self._hashes, self._places = self._hashes[order], places[order]

    def find(self, image: StoredImage, role: ImageRole) -> StoredImage | None:
        """``image`` with what was read from it; None if it was not read, or has changed."""
        wanted = np.uint64(_hash(image, role))
        index = int(np.searchsorted(self._hashes, wanted))
        if index == len(self._hashes) or self._hashes[index] != wanted:
            return None
        number, offset = map(int, self._places[index])
        found = stored_image(self._columns[number][offset].as_py(), self._base)
        # Two keys may have the same hash. A file that could not be read may be readable now.
        return found if found.key() == image.key() and found.sha256 is not None else None


def _hash(image: StoredImage, role: ImageRole) -> int:
    return int.from_bytes(hashlib.blake2b(f"{role}|{image.key()}".encode(), digest_size=8).digest(), "little")


def _batches_of_table(file: Path) -> Sequence[pa.RecordBatch]:
    with suppress(UserError):  # none yet, or one of another version, which is made again
        return MappedTable(file).batches
    return ()


@contextmanager
def table_lock(file: Path) -> Iterator[None]:
    """Context manager: only one process makes the table ``file``; the others wait until it is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file.with_name(f"{file.name}.lock"))
    try:
        lock.acquire(timeout=_WAITED)
    except Timeout:
        log.info("waiting for another process that reads the same images")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
