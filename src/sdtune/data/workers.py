"""Processes that load pictures."""

from __future__ import annotations

import signal


def leave_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a run; only the training one answers, by saving."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
