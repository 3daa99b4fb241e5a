"""Stop signals for jobs in joblib workers: each job receives one stop signal and saves.

joblib kills its workers when its main process is interrupted, even while they write a checkpoint. Imports no torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

from sdtune.files import write_text
from sdtune.hardware.signals import STOP_SIGNALS, handled

STOPPING = "sdtune: stopping; the running jobs save first (Ctrl-C again ends them immediately)"

_WORKERS = ".workers"
"""Subfolder of the sweep with one file per process that runs a job and can receive a stop signal."""

_STOPPING = ".stopping"
"""File in the sweep's folder while the sweep is being stopped; no new job starts."""


def stop_code(sweep: Path) -> int | None:
    """Exit code of the sweep if it is being stopped, else None."""
    file = sweep / _STOPPING
    return int(file.read_text(encoding="utf-8")) if file.is_file() else None


class StopRelay:
    """Context manager for the main process of a sweep: forwards the first Ctrl-C or SIGTERM to the jobs in the workers.

    Attributes:
        code: exit code after a stop signal; None before.
    """

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self.code: int | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StopRelay:
        (self.sweep / _STOPPING).unlink(missing_ok=True)
        self._stack.enter_context(handled(STOP_SIGNALS, self._forward))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        (self.sweep / _STOPPING).unlink(missing_ok=True)
        for file in self.sweep.glob(f"{_WORKERS}/*"):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (self.sweep / _WORKERS).rmdir()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.code is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.code = 128 + number
        write_text(self.sweep / _STOPPING, str(self.code))  # atomic, because a worker may read it at any time
        print(STOPPING, file=sys.stderr)
        ready = {file.name for file in self.sweep.glob(f"{_WORKERS}/*")}
        for process in multiprocessing.active_children():
            if str(process.pid) in ready:
                with contextlib.suppress(ProcessLookupError):
                    # After Ctrl-C in a terminal the worker has received SIGINT already and ignores SIGTERM.
                    os.kill(int(str(process.pid)), signal.SIGTERM)


@contextlib.contextmanager
def stoppable(sweep: Path) -> Iterator[None]:
    """Context manager for a job in a joblib worker: a stop signal interrupts the job but does not end the worker.

    If one worker ends, joblib ends all of them.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        signal.signal(number, interrupt)
    marker = sweep / _WORKERS / str(os.getpid())
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # there is nothing to stop between jobs
        marker.unlink(missing_ok=True)
