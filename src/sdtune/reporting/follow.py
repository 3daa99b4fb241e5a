"""Write the report again and again while a run or a sweep goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from sdtune.errors import UserError
from sdtune.reporting.collect import Run, read_run, run_folders
from sdtune.reporting.images import ImageStore
from sdtune.reporting.page import write_report

_SHORTEST = 5.0
"""Seconds between two pages."""
_SHARE = 0.01
"""Share of one core that writing pages may take."""


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
        """Write the page; None if the folder has no run yet. The ``last`` page does not reload itself."""
        start = time.process_time()
        try:
            folders = run_folders(self.folder)
        except UserError:
            if not self.folder.is_dir():
                raise
            return None
        runs = [self._run(folder) for folder in folders]
        file = write_report(runs, self.folder, self.title, self._store, None if last else self.interval)
        self.interval = max(_SHORTEST, (time.process_time() - start) / _SHARE)
        return file

    def _run(self, folder: Path) -> Run:
        files = [folder / name for name in ("metrics.json", "metrics.csv", "job.json", ".hydra/overrides.yaml")]
        changed = tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)
        known = self._runs.get(folder)
        if known is None or known[0] != changed or known[1].state == "unfinished":
            self._runs[folder] = known = (changed, read_run(folder))
        return known[1]

    @property
    def is_finished(self) -> bool:
        """Whether no run of the last page goes on, and no job of the sweep is missing."""
        is_sweep = (self.folder / "multirun.yaml").is_file()
        states = {run.state for _, run in self._runs.values()}
        return bool(states) and "unfinished" not in states and (not is_sweep or (self.folder / "sweep.json").is_file())


def follow(follower: Follower, stop: threading.Event, written: Callable[[Path], None]) -> None:
    """Write pages until all runs are finished or ``stop`` is set, and then the last page.

    Args:
        written: called with the file of each page.
    """
    while not stop.is_set():
        file = follower.write()
        if file is not None:
            written(file)
        if follower.is_finished or stop.wait(follower.interval):
            break
    file = follower.write(last=True)
    if file is not None:
        written(file)
