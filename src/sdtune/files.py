"""Atomic writes of files and folders, reads of JSON and YAML, and folder locks."""

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

import yaml
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdtune.errors import UserError

_LEFT_OVER_AFTER = 3600.0
"""Seconds without a change after which a partial file counts as the leftover of a killed process."""

_PARTIAL, _REPLACED = ".partial", ".replaced"
"""Name suffixes: of a file or folder being written, and of a folder being replaced."""
_LEFTOVER = re.compile(rf"(.+)\.[0-9a-f]{{32}}({_PARTIAL}|{_REPLACED})")
"""Names that :func:`_temporary` creates: name of the target (at most 200 bytes), and suffix."""


@contextmanager
def replacing(path: Path, *, sync: bool = True, alone: bool = False) -> Iterator[Path]:
    """Context manager that writes a file or a folder atomically.

    It yields a temporary path next to ``path``, at which the block creates a file or a folder. At the end of the block,
    the temporary file or folder gets the permissions of the umask, is synced to disk and replaces ``path``. If the
    block raises, it is removed and ``path`` stays unchanged. The next write of the same name removes leftovers of
    killed processes; :func:`remove_leftovers` removes those of a whole folder.

    Args:
        path: the target; its parent folder is created if missing. Several processes may write the same file at the same
            time; a folder may have only one writer.
        sync: False for files that can be recreated, such as cache entries: a power failure may lose them.
        alone: True if the caller holds a lock against other writers: leftovers are then removed immediately, not after
            an hour.
    """
    if path.is_dir():
        path = path.resolve()  # replace the target of a symbolic link, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path, 0.0 if alone else _LEFT_OVER_AFTER)
    partial = _temporary(path, _PARTIAL)
    try:
        yield partial
        _apply_umask(partial, path)
        if sync:
            _sync(partial)
        _move(partial, path)
        if sync:
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # do not hide the block's exception
            _remove(partial)


def is_partial(path: Path) -> bool:
    """Whether ``path`` is an unfinished file or folder, possibly of a killed process; readers of its folder skip it."""
    return path.name.endswith((_PARTIAL, _REPLACED))


def is_snapshot(stem: str) -> bool:
    """Whether a file with this stem is a snapshot (of a step or of the best step), not a final artifact."""
    return re.search(r"-step\d{8}$|-best$", stem) is not None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to ``path`` as JSON, atomically.

    Raises:
        ValueError: ``content`` contains NaN or infinity.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _prefix(path: Path) -> str:
    """Name of ``path``, truncated so that the temporary names built from it have at most 255 bytes."""
    return path.name.encode()[:200].decode(errors="ignore")


def _temporary(path: Path, suffix: str) -> Path:
    """Temporary path in the folder of ``path`` (a rename within a file system is atomic).

    The name is random, not the process id, because threads share a process id.
    """
    return path.with_name(f"{_prefix(path)}.{uuid.uuid4().hex}{suffix}")


def _remove_leftovers(path: Path, age: float) -> None:
    prefix = f"{_prefix(path)}."
    for name in os.listdir(path.parent):  # noqa: PTH208
        if not name.startswith(prefix) or not (match := _LEFTOVER.fullmatch(name)) or f"{match[1]}." != prefix:
            continue
        entry = path.with_name(name)
        with contextlib.suppress(OSError):  # already removed, or owned by another user
            if match[2] == _REPLACED and not path.exists():
                entry.rename(path)  # the writer was killed between the two renames of _move
            elif _last_change(entry) <= time.time() - age:
                _remove(entry)


def remove_leftovers(folder: Path) -> None:
    """Remove the partial files and folders of killed processes below ``folder``, whose lock the caller must hold.

    A folder that was moved aside and not replaced yet is kept; the next write of the same name restores it.
    """
    for entry in list(folder.rglob("*")):
        match = _LEFTOVER.fullmatch(entry.name)
        if match and (match[2] == _PARTIAL or entry.with_name(match[1]).exists()):
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


def _apply_umask(partial: Path, path: Path) -> None:
    """Set the permissions that new files and folders get; safetensors creates files that only their owner can read."""
    probe = _temporary(path, _PARTIAL)
    try:
        with open(probe, "x", encoding="utf-8"):  # noqa: PTH123
            mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for entry in (partial, *partial.rglob("*")):
        if not entry.is_symlink():
            # Read permission of a folder implies execute permission.
            expected_mode = mode | (mode & 0o444) >> 2 if entry.is_dir() else mode
            if stat.S_IMODE(entry.stat().st_mode) != expected_mode:
                entry.chmod(expected_mode)


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
    """Sync the directory entries; some file systems and Windows do not support it."""
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
    # No portable system call replaces a non-empty folder.
    old = _temporary(path, _REPLACED)
    try:
        path.rename(old)
        partial.replace(path)
    except BaseException:  # also a stop by a signal
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    _remove(old)


def mark_used(path: Path) -> None:
    """Set the modification time of a cache entry to now: ``sdtune cache`` removes the least recently used entries."""
    with contextlib.suppress(OSError):  # an entry of another user
        os.utime(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager that locks ``folder`` (created if missing) against other processes; a killed process releases it.

    Raises:
        UserError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=_PROBED)
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by another process", remedy="wait for it to end, or use another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process has locked ``folder``, such as the run or the sweep that goes on in it."""
    file = folder / ".lock"
    if not file.is_file():
        return False
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


_PROBED = 0.2
"""Seconds that :func:`locked` waits for :func:`is_locked` of another process."""
_REMEDY = "restore it from a copy"


def read_json(file: Path, key: str | None = None, remedy: str = _REMEDY) -> dict[str, Any]:
    """JSON object in ``file``.

    Args:
        file: file in UTF-8.
        key: config key of the file or of its folder, for errors.
        remedy: for errors.

    Raises:
        UserError: the file cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error})", key=key, remedy=remedy) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object", key=key, remedy=remedy)
    return content


_YAML_ERRORS = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, KeyError, RecursionError)
"""PyYAML raises exceptions of Python for values that it cannot convert, such as ``!!bool x``."""


def read_yaml(file: Path, key: str | None = None) -> Any:
    """OmegaConf's config in ``file``, such as a config or the overrides that Hydra has saved.

    Raises:
        UserError: the file cannot be read, or is not YAML.
    """
    try:
        return OmegaConf.load(file)
    except (OSError, *_YAML_ERRORS) as error:
        lines = str(error).split("\n")
        raise UserError(f"{file} cannot be read ({lines[0]})", key=key, remedy=_REMEDY) from error


class _SavedYaml(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as OmegaConf saves it, where dates are text."""


_SavedYaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_SavedYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_saved_yaml(file: Path, key: str | None = None) -> Any:
    """The config in ``file``, which OmegaConf has written; ten times as fast as :func:`read_yaml`, by libyaml.

    Raises:
        UserError: the file cannot be read, or is not YAML.
    """
    try:
        return OmegaConf.create(yaml.load(file.read_text(encoding="utf-8"), _SavedYaml) or {})
    except (OSError, *_YAML_ERRORS) as error:
        raise UserError(f"{file} cannot be read ({str(error).splitlines()[0]})", key=key, remedy=_REMEDY) from error
