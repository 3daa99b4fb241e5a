"""Signals for all processes that a subprocess has started; imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil


def signal_session(pid: int, number: int) -> None:
    """Send a signal to all processes of the session that process ``pid`` leads; on Windows, to it and its children."""
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if hasattr(os, "killpg"):
            os.killpg(pid, number)
            return
        process = psutil.Process(pid)
        for member in (*process.children(recursive=True), process):
            member.send_signal(number)


def kill_session(pid: int) -> None:
    """Kill all processes of the session that process ``pid`` leads; on Windows, it and its children."""
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if hasattr(os, "killpg"):
            os.killpg(pid, signal.SIGKILL)
            return
        process = psutil.Process(pid)
        for member in (*process.children(recursive=True), process):
            member.kill()


def lead_session() -> None:
    """Put this process into a session of its own, so that signals of a terminal do not reach it; not on Windows."""
    if hasattr(os, "setsid"):
        os.setsid()
