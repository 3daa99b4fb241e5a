"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` beside ``path``, sync, rename."""
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w") as handle:
        json.dump(content, handle, indent=2, allow_nan=False)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder``, which is made; ValueError where one is in it. Its death sets it free."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another process; wait for it, or name another folder") from error
    try:
        yield
    finally:
        lock.release()
