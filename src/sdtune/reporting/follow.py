"""Write the report again and again while a run or a sweep goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from sdtune.errors import UserError
from sdtune.files import is_locked
from sdtune.reporting.collect import Run, read_run, run_folders
from sdtune.reporting.images import ImageStore
from sdtune.reporting.page import write_report

_SHORTEST = 5.0
"""Seconds between two pages."""
_SHARE = 0.01
"""Share of one core that writing pages may take."""
_CHECK = 5.0
"""Seconds between two looks at whether the runs go on."""


class Follower:
    """Writes pages of ``folder``; finished runs are read once.

    Args:
        folder: folder of a run or of a sweep, or any folder with runs.
        title: title of the page.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self.interval = _SHORTEST
        """Seconds until the next page."""
        self._store = ImageStore()
        self._runs: dict[Path, tuple[tuple[int, ...], Run]] = {}

    def write(self, *, last: bool = False) -> Path | None:
        """Write the page; None if the folder has no run yet. The ``last`` page does not reload itself.

        A run whose files are being written is shown as it was before.
        """
        start = time.process_time()
        try:
            folders = run_folders(self.folder)
        except UserError:
            if not self.folder.is_dir():
                raise
            return None
        runs = [run for run in map(self._run, folders) if run is not None]
        if not runs:
            return None
        file = write_report(runs, self.folder, self.title, self._store, None if last else self.interval)
        self.interval = max(_SHORTEST, (time.process_time() - start) / _SHARE)
        return file

    def _run(self, folder: Path) -> Run | None:
        files = [folder / name for name in ("metrics.json", "metrics.csv", "job.json", ".hydra/overrides.yaml")]
        changed = tuple(map(_time, files))
        known = self._runs.get(folder)
        if known is None or known[0] != changed or known[1].state in ("running", "unfinished"):
            try:
                self._runs[folder] = known = (changed, read_run(folder))
            except (UserError, OSError):
                if known is None:
                    return None
        return known[1]

    @property
    def goes_on(self) -> bool:
        """Whether a process works on the folder, or on an unfinished run in it."""
        unfinished = [path for path, (_, run) in self._runs.items() if run.state in ("running", "unfinished")]
        return any(map(is_locked, (self.folder, *unfinished)))


def _time(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def follow(follower: Follower, stop: threading.Event, written: Callable[[Path], None]) -> None:
    """Write pages while a run goes on and ``stop`` is not set, and then the last page; waits for the first run.

    Args:
        written: called with the file of each page.
    """
    while not stop.is_set():
        file = follower.write()
        if file is not None:
            written(file)
        next_page = time.monotonic() + follower.interval
        while (file is None or follower.goes_on) and (left := next_page - time.monotonic()) > 0:
            if stop.wait(min(left, _CHECK)):
                break
        if file is not None and not follower.goes_on:
            break
    file = follower.write(last=True)
    if file is not None:
        written(file)
