"""List the files of an image folder; skips system folders, sdtune's outputs, and folders that other settings name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdtune.errors import UserError

_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
"""Folders that macOS, Synology's and Windows' file systems create; their images are thumbnails or deleted files."""

_RUN_MARKS = (".hydra", "multirun.yaml")
"""Names in the folders that sdtune's commands write."""

_SHOWN_NAMES = 3


@dataclass(frozen=True)
class Listing:
    """Files below a folder.

    Args:
        files: sorted by path.
        states: size in bytes and modification time in nanoseconds of each file; zeros for a broken link.
        left_out: folders that were not read, and why.
    """

    files: tuple[Path, ...]
    states: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    left_out: tuple[tuple[Path, str], ...] = ()

    def lines(self, root: Path) -> list[str]:
        """One line for each reason to leave out folders, for the data summary."""
        reasons: dict[str, list[Path]] = {}
        for folder, reason in self.left_out:
            reasons.setdefault(reason, []).append(folder)
        return [f"not read: {count_and_names(folders, root)}: {reason}" for reason, folders in reasons.items()]


def list_files(folder: Path, key: str, other_roles: Mapping[Path, str]) -> Listing:
    """List the files in and below ``folder``; hidden files and system folders are skipped, links are followed.

    Args:
        folder: absolute path; an empty listing if it is not a folder.
        key: config key of the folder, for errors.
        other_roles: config key by resolved path of the folders of other settings; they are left out.

    Raises:
        UserError: ``folder`` is also set for another key, a folder cannot be read, or a link leads to a parent folder.
    """
    role = other_roles.get(folder.resolve())
    if role is not None:
        raise UserError(f"{folder} is also set as {role}", key=key, remedy="use a separate folder for each")
    left_out: list[tuple[Path, str]] = []
    states = dict(_walk(folder, key, other_roles, (), left_out)) if folder.is_dir() else {}
    # Sort by parts: the comparison of paths differs between Python versions, and the order must be reproducible.
    files = tuple(sorted(states, key=lambda file: file.parts))
    return Listing(files, states, tuple(left_out))


def _walk(
    folder: Path,
    key: str,
    other_roles: Mapping[Path, str],
    parents: tuple[Path, ...],
    left_out: list[tuple[Path, str]],
) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Files in and below ``folder``, each with its size and modification time."""
    resolved = folder.resolve()
    if resolved in parents:
        raise UserError(f"{folder} links to one of its parent folders", key=key, remedy="remove this link")
    try:
        with os.scandir(folder) as scanned:  # asks for the type of each entry together with its name
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})", key=key, remedy="make it readable") from error
    if reason := _reason(resolved, entries, other_roles) if parents else None:
        left_out.append((folder, reason))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        if not entry.is_dir():
            yield path, _state(entry)
        elif entry.name in _SYSTEM_FOLDERS:
            left_out.append((path, "made by the operating system"))
        else:
            yield from _walk(path, key, other_roles, (*parents, resolved), left_out)


def _state(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:  # a broken link
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _reason(resolved: Path, entries: Sequence[os.DirEntry[str]], other_roles: Mapping[Path, str]) -> str | None:
    """Why a folder is left out; None if it is read."""
    if any(entry.name in _RUN_MARKS for entry in entries):
        return "written by sdtune"
    role = other_roles.get(resolved)
    return None if role is None else f"used as {role}"


def count_and_names(paths: Sequence[Path], root: Path) -> str:
    """Count and first names of ``paths`` relative to ``root``, such as ``5 (a.png, b.png, c.png, ...)``."""
    names = [str(path.relative_to(root)) for path in paths[:_SHOWN_NAMES]]
    return f"{len(paths)} ({', '.join([*names, *(['...'] if len(paths) > _SHOWN_NAMES else [])])})"
