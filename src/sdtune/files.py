"""Files and folders that are written whole or not at all, and locked folders."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sdtune.errors import UserError

_LEFT_OVER_AFTER = 3600.0
"""Seconds without a change, after which another writer's partial file is taken for one of a killed process."""

_PARTIAL, _REPLACED = ".partial", ".replaced"
"""Ends of names: of what is being written, and of a folder that is about to be replaced."""


@contextmanager
def replacing(path: Path, *, sync: bool = True, alone: bool = False) -> Iterator[Path]:
    """Write a file or a folder whole or not at all: yields a path beside ``path``, which then takes its place.

    The block makes a file or a folder at the yielded path. When it ends, that gets the modes that the umask says, is
    synced, and replaces ``path``. When it raises, that is removed, and ``path`` stays as it was. Leftovers of killed
    processes are removed at the next write of the same name.

    Args:
        path: its folder is made where there is none. Several writers of one file do not meet; a folder has one writer.
        sync: False for what can be made again, such as cache entries: then a power failure may lose it.
        alone: whether the caller keeps other writers out by a lock: then leftovers go at once, not after an hour.
    """
    if path.is_dir():
        path = path.resolve()  # what a link names is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path, 0.0 if alone else _LEFT_OVER_AFTER)
    partial = _beside(path, _PARTIAL)
    try:
        yield partial
        _take_umask(partial, path)
        if sync:
            _sync(partial)
        _move(partial, path)
        if sync:
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # what the block raised counts
            _remove(partial)


def is_partial(path: Path) -> bool:
    """Whether ``path`` is what a killed process left, and so to be passed over by who reads its folder."""
    return path.name.endswith((_PARTIAL, _REPLACED))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to ``path`` as JSON, whole or not at all; ValueError for NaN and infinity."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _start(path: Path) -> str:
    """``path``'s name, cut so that the names made from it have at most 255 bytes."""
    return path.name.encode()[:200].decode(errors="ignore")


def _beside(path: Path, end: str) -> Path:
    """In the same file system, where a rename is atomic; at random, because threads share a process id."""
    return path.with_name(f"{_start(path)}.{uuid.uuid4().hex}{end}")


def _remove_leftovers(path: Path, age: float) -> None:
    start = f"{_start(path)}."
    pattern = re.compile(rf"{re.escape(start)}[0-9a-f]{{32}}({_PARTIAL}|{_REPLACED})")
    for name in os.listdir(path.parent):  # noqa: PTH208
        if not name.startswith(start) or not (match := pattern.fullmatch(name)):
            continue
        entry = path.with_name(name)
        with contextlib.suppress(OSError):  # another writer's own, gone by now, or not this user's to remove
            if match[1] == _REPLACED and not path.exists():
                entry.rename(path)  # killed between two renames
            elif _last_change(entry) <= time.time() - age:
                _remove(entry)


def _last_change(path: Path) -> float:
    times = [path.lstat().st_mtime]
    for folder, _, _ in os.walk(path):
        times += [entry.stat(follow_symlinks=False).st_mtime for entry in os.scandir(folder)]
    return max(times)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _take_umask(partial: Path, path: Path) -> None:
    """Give files and folders the modes of new ones: safetensors makes files that their owner alone can read."""
    probe = _beside(path, _PARTIAL)
    try:
        with open(probe, "x"):  # noqa: PTH123
            mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for entry in (partial, *partial.rglob("*")):
        if not entry.is_symlink():
            # Who may read a folder may enter it.
            wanted = mode | (mode & 0o444) >> 2 if entry.is_dir() else mode
            if stat.S_IMODE(entry.stat().st_mode) != wanted:
                entry.chmod(wanted)


def _sync(path: Path) -> None:
    for entry in (*path.rglob("*"), path):
        if entry.is_symlink():
            continue
        if entry.is_dir():
            _sync_folder(entry)
        else:
            with entry.open("rb+") as handle:
                os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    """The names in it; not every file system, nor Windows, can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move(partial: Path, path: Path) -> None:
    if not (partial.is_dir() and path.is_dir()):
        partial.replace(path)
        return
    # No system call puts one folder in the place of another that is not empty.
    old = _beside(path, _REPLACED)
    try:
        path.rename(old)
        partial.replace(path)
    except BaseException:  # a stop by a signal, too
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    _remove(old)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder``, which is made; UserError where one is in it. Its death sets it free."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by another process", remedy="wait for it, or name another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
