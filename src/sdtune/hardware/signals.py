"""Temporary signal handlers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn


def _stop_signals() -> tuple[signal.Signals, ...]:
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return tuple(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)


STOP_SIGNALS = _stop_signals()
"""Signals at which a run saves and stops: SIGINT (Ctrl-C), SIGTERM (job schedulers), SIGHUP (closed terminal).

A signal that is ignored when the process starts stays ignored: SIGHUP under nohup, SIGINT in background jobs of shell
scripts."""


def stop_before_start(number: int, frame: FrameType | None) -> NoReturn:
    """Signal handler while a command is checked: ends the process; the caller removes what it has created."""
    with suppress(OSError):
        os.write(2, b"sdtune: stopped before the start; no run folder is left\n")  # print may be what was interrupted
    raise SystemExit(128 + number)


@contextmanager
def handled(numbers: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Context manager that handles the signals ``numbers`` with ``handler`` and restores the previous handlers.

    Outside of the main thread, where Python allows no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handlers = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            signal.signal(number, previous)
