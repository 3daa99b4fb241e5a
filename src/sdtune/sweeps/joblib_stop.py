"""Stop signals for jobs in joblib's workers: each job gets a stop once, and saves.

joblib kills its workers where its own process is interrupted, in the middle of a checkpoint too. Imports no torch.
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

STOPPING = "sdtune: stopping; the jobs at hand save first (Ctrl-C again ends them at once)"

_WORKERS = ".workers"
"""Of a sweep's folder: a file for each process that is in a job and can be told to stop."""

_STOPPING = ".stopping"
"""Of a sweep's folder, while it is being stopped: no further job starts."""


def stopping(sweep: Path) -> int | None:
    """The exit code of a sweep that is being stopped, else None."""
    file = sweep / _STOPPING
    return int(file.read_text()) if file.is_file() else None


class Relay:
    """In the sweep's own process, while its workers run: hands the first Ctrl-C or SIGTERM on to the jobs.

    Attributes:
        code: the exit code, once it has been asked to stop.
    """

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self.code: int | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Relay:
        (self.sweep / _STOPPING).unlink(missing_ok=True)
        self._stack.enter_context(handled(STOP_SIGNALS, self._hand_on))
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

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        if self.code is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.code = 128 + number
        write_text(self.sweep / _STOPPING, str(self.code))  # whole: a worker may look at any moment
        print(STOPPING, file=sys.stderr)
        ready = {file.name for file in self.sweep.glob(f"{_WORKERS}/*")}
        for process in multiprocessing.active_children():
            if str(process.pid) in ready:
                with contextlib.suppress(ProcessLookupError):
                    # A terminal's Ctrl-C has reached it already, and a SIGTERM after it changes nothing.
                    os.kill(int(str(process.pid)), signal.SIGTERM)


@contextlib.contextmanager
def reachable(sweep: Path) -> Iterator[None]:
    """In a worker, around a job: a signal stops the job, not the worker; joblib takes the others down with one."""
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not came:
            came.append(number)
            raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        signal.signal(number, interrupt)
    place = sweep / _WORKERS / str(os.getpid())
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # between two jobs there is nothing to stop
        place.unlink(missing_ok=True)
