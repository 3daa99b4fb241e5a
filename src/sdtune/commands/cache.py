"""``sdtune cache``: show the size of the cache, and remove entries by age or total size."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sdtune.errors import UserError
from sdtune.files import is_partial
from sdtune.paths import cache_folder, oldest_running

_HELP = """usage: sdtune cache [older_than=DAYS] [max_gib=GIB] [dry_run=true]

Shows the size of the cache that all runs share. With older_than=, removes entries that no command has used for that
many days; with max_gib=, the least recently used entries until the cache is at most that large. Entries that a
running command may use are kept. Removed entries are computed again when they are needed.
"""

KINDS = {
    "latents": "latents of images",
    "text": "text embeddings",
    "class": "class images",
    "control": "control maps",
    "base": "images of base models",
    "backbones": "models converted from single files",
    "hashes": "hashes of models",
    "tables": "tables of image folders",
}
"""Subfolders of the cache."""

_EXPECTED = {
    "older_than": "a number of days, such as older_than=30",
    "max_gib": "a number of GiB, such as max_gib=20",
    "dry_run": "dry_run=true or dry_run=false",
}
"""Argument -> what it accepts."""

_DAY = 24 * 3600
_GIB = 1024**3


@dataclass(frozen=True)
class Entry:
    """A file of the cache, or the folder of a converted model.

    Attributes:
        size: bytes on disk.
        used: time of the last use, in seconds since the epoch.
    """

    path: Path
    kind: str
    size: int
    used: float


@dataclass(frozen=True)
class Removal:
    """What to remove: entries not used for ``older_than`` days, and the oldest ones above ``max_gib`` GiB in total."""

    older_than: float | None = None
    max_gib: float | None = None
    dry_run: bool = False


def main(arguments: Sequence[str]) -> None:
    """Print the size of the cache, and remove what ``arguments`` (``KEY=VALUE``) ask for."""
    if list(arguments) in (["-h"], ["--help"]):
        print(_HELP, end="")
        return
    removal = parse(arguments)
    folder = cache_folder()
    entries = list_entries(folder)
    since = oldest_running(folder)
    removed = to_remove(entries, removal, time.time(), since)
    if not removal.dry_run:
        removed = [entry for entry in removed if _remove(entry)]
        gone = {entry.path for entry in removed}
        entries = [entry for entry in entries if entry.path not in gone]
    print(f"cache: {folder}")
    for line in _table(entries, time.time()):
        print(line)
    if removal.older_than is not None or removal.max_gib is not None:
        verb = "would be removed" if removal.dry_run else "removed"
        print(f"{verb}: {len(removed)} entries, {_size(sum(entry.size for entry in removed))}")
        if since is not None:
            kept = sum(entry.used >= since for entry in entries)
            print(f"kept: {kept} entries that a running command may use")
    else:
        print("sdtune cache older_than=30 removes what was not used for 30 days, max_gib=20 the oldest above 20 GiB")


def parse(arguments: Sequence[str]) -> Removal:
    values: dict[str, float | bool] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("older_than", "max_gib") and re.fullmatch(r"\d+(\.\d+)?", value):
            values[key] = float(value)
        elif key == "dry_run" and value in ("true", "false"):
            values[key] = value == "true"
        elif key in _EXPECTED:
            raise UserError(f"got {value!r}", key=key, remedy=f"set {_EXPECTED[key]}")
        else:
            raise UserError(
                f"unknown argument {argument}",
                key="cache",
                remedy="use older_than=DAYS, max_gib=GIB or dry_run=true",
            )
    return Removal(**values)  # type: ignore[arg-type]


def list_entries(folder: Path) -> list[Entry]:
    """All entries of the cache in ``folder``."""
    return [entry for kind in KINDS for entry in _entries(folder / kind, kind)]


def _entries(folder: Path, kind: str) -> Iterator[Entry]:
    if kind == "backbones":
        paths = [path for path in folder.glob("*") if path.is_dir()]
    else:
        paths = [path for path in folder.rglob("*") if not path.is_dir() and path.suffix != ".lock"]
    for path in paths:
        # A running command may write or remove files at the same time.
        if not is_partial(path):
            with suppress(FileNotFoundError):
                yield Entry(path, kind, _bytes(path), path.stat().st_mtime)


def _bytes(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_symlink() or not file.is_dir())


def to_remove(entries: Sequence[Entry], removal: Removal, now: float, running_since: float | None) -> list[Entry]:
    """The entries to remove, least recently used first.

    Args:
        now: the current time, in seconds since the epoch.
        running_since: start of the oldest running command; entries that were used after it are kept. None if none runs.
    """
    by_use = sorted(entries, key=lambda entry: entry.used)
    removable = [entry for entry in by_use if running_since is None or entry.used < running_since]
    removed = []
    if removal.older_than is not None:
        removed = [entry for entry in removable if now - entry.used > removal.older_than * _DAY]
    if removal.max_gib is not None:
        excess = sum(entry.size for entry in entries) - sum(entry.size for entry in removed) - removal.max_gib * _GIB
        for entry in removable[len(removed) :]:
            if excess <= 0:
                break
            removed.append(entry)
            excess -= entry.size
    return removed


def _remove(entry: Entry) -> bool:
    """Remove ``entry``; returns False if a command has used it since it was listed, or is writing it now."""
    path = entry.path
    try:
        if path.stat().st_mtime != entry.used:
            return False
        if not path.is_dir():
            path.unlink()
            return True
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=0):  # the lock of the conversion
            # Rename the folder before it is deleted, so that no other process reads a part of it.
            hidden = path.with_name(f".{path.name}.{os.getpid()}")
            path.rename(hidden)
            shutil.rmtree(hidden)
        return True
    except (FileNotFoundError, Timeout):
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be removed ({error.strerror})", remedy="check its permissions") from error


def _table(entries: Sequence[Entry], now: float) -> list[str]:
    lines = [f"{'':<36}{'entries':>9}{'size':>12}{'last used, days ago':>22}"]
    for kind, name in KINDS.items():
        own = [entry for entry in entries if entry.kind == kind]
        if own:
            days = sorted(max(0.0, now - entry.used) / _DAY for entry in own)
            ages = f"{days[0]:.0f} to {days[-1]:.0f}"
            lines.append(f"{name:<36}{len(own):>9,}{_size(sum(entry.size for entry in own)):>12}{ages:>22}")
    return [*lines, f"{'total':<36}{len(entries):>9,}{_size(sum(entry.size for entry in entries)):>12}"]


def _size(count: float) -> str:
    return f"{count / _GIB:,.2f} GiB" if count >= _GIB else f"{count / 1024**2:,.2f} MiB"
