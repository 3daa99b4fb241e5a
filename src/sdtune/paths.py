"""Paths of the shipped configs, the pocket backbone, the cache that all runs share, and models of the hub."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sdtune.errors import UserError

_POCKET = Path(__file__).parent / "pocket"

_CACHE_REMEDY = "set the environment variable SDTUNE_CACHE to a writable folder"

_RUNNING = "running"
"""Subfolder of the cache with one locked file for each process that uses it."""

_ATTEMPTS = 5

_CLOCK_TOLERANCE = 60.0
"""Seconds by which the clock of a file system may be behind that of the process."""


def config_folder() -> Path:
    """Folder of the Hydra config groups: ``sdtune/conf`` in a wheel, ``conf`` in a checkout."""
    packaged = Path(__file__).parent / "conf"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"
    assert folder.is_dir(), folder
    return folder


def cache_location() -> Path:
    """Folder of cached hashes, latents and text embeddings: ``$SDTUNE_CACHE``, else ``sdtune`` in the user's cache.

    Raises:
        UserError: there is none.
    """
    configured, shared = os.environ.get("SDTUNE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(configured).expanduser() if configured else Path(shared or Path.home() / ".cache") / "sdtune"
    except RuntimeError as error:  # a user without an entry in the system's list, as in some containers
        raise UserError(f"there is no cache folder ({error})", key="SDTUNE_CACHE", remedy=_CACHE_REMEDY) from error


def cache_folder() -> Path:
    """The folder of :func:`cache_location`, created if missing.

    Raises:
        UserError: it cannot be created or written.
    """
    folder = cache_location()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(folder, os.W_OK) else "not writable"
    except OSError as error:
        problem = str(error.strerror)
    if problem is not None:
        raise UserError(f"the cache folder {folder} cannot be used ({problem})", remedy=_CACHE_REMEDY)
    return folder


@contextmanager
def cache_in_use() -> Iterator[None]:
    """Context manager during which ``sdtune cache`` keeps the entries that this process uses.

    Every use of an entry updates its modification time (:func:`sdtune.files.mark_used`). The start of the process is in
    the name of a file that it keeps locked; a process that ends, or is killed, releases it. Folders that this function
    creates are removed at the end if they are empty.
    """
    lock, created = None, []
    try:
        folder = cache_location() / _RUNNING
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = _running_lock(folder)
    except (UserError, OSError):  # a command that needs the cache reports this itself
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            if lock is not None:
                lock.release()
                Path(lock.lock_file).unlink(missing_ok=True)
            for path in created:
                path.rmdir()


def _running_lock(folder: Path) -> FileLock | None:
    """Locked file of this process in ``folder``; another name if ``sdtune cache`` is just testing the file."""
    for _ in range(_ATTEMPTS):
        lock = FileLock(folder / f"{time.time_ns()}-{os.getpid()}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        if Path(lock.lock_file).exists():
            return lock
        lock.release()
    return None


def oldest_running(cache: Path) -> float | None:
    """Start of the oldest running process that uses ``cache``, in seconds since the epoch; None if there is none.

    0 if it belongs to another user, who cannot update the modification times of this user's entries.
    """
    starts = []
    for file in (cache / _RUNNING).glob("*-*.lock"):
        lock = FileLock(file)
        try:
            if hasattr(os, "getuid") and file.stat().st_uid != os.getuid():
                starts.append(0.0)
                continue
            lock.acquire(timeout=0)
        except FileNotFoundError:
            continue
        except (Timeout, OSError):
            starts.append(int(file.name.partition("-")[0]) / 1e9 - _CLOCK_TOLERANCE)
            continue
        lock.release()
        file.unlink(missing_ok=True)
    return min(starts, default=None)


def command_line_folder(sources: Iterable[Any]) -> str | None:
    """The ``--config-dir`` in Hydra's config ``sources``; None if it is not set."""
    return next((str(source.path) for source in sources if source.provider == "command-line"), None)


def pocket_pipeline() -> Path:
    """Pipeline folder of the shipped pocket backbone, in the diffusers layout."""
    return _POCKET / "models" / "pipeline"


def pocket_clip() -> Path:
    """Folder of the CLIP model whose text tower is the pocket backbone's text encoder."""
    return _POCKET / "models" / "clip"


def pocket_art() -> Path:
    """Folder of the drawings that the pocket images are composed of, one subfolder per style."""
    return _POCKET / "art"


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form USER/NAME of a Hugging Face hub id; a local path may have it too."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~"))


def download_model(name: str, patterns: Sequence[str], key: str) -> Path:
    """Folder with the files of the hub model ``name`` that match ``patterns``; missing ones are downloaded.

    Args:
        name: hub id.
        patterns: glob patterns of file names.
        key: config key of the model, for errors.

    Raises:
        UserError: they cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} is not a local folder and cannot be downloaded from the hub ({reason})", key=key
        ) from error
