"""Signals for all processes that a subprocess has started; imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil


def signal_session(pid: int, number: int) -> None:
    """Send a signal to all processes of the session that process ``pid`` leads; on Windows, end it and its children."""
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if hasattr(os, "killpg"):
            os.killpg(pid, number)
            return
        for member in _members(pid):
            # Windows has only termination for other processes.
            with contextlib.suppress(psutil.Error):
                member.terminate()


def kill_session(pid: int) -> None:
    """Kill all processes of the session that process ``pid`` leads; on Windows, it and its children."""
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if hasattr(os, "killpg"):
            os.killpg(pid, signal.SIGKILL)
            return
        for member in _members(pid):
            with contextlib.suppress(psutil.Error):
                member.kill()


def lead_session() -> None:
    """Put this process into a session of its own, so that signals of a terminal do not reach it; not on Windows."""
    if hasattr(os, "setsid"):
        os.setsid()


def _members(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [*process.children(recursive=True), process]
