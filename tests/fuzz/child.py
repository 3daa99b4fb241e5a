"""Call a function in a forked process with limited time and memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path


def in_child(function: Callable[[], str], seconds: int, memory: int) -> str:
    """Result of ``function``; the traceback if it raises an exception or the process dies.

    Args:
        function: returns a text without the character NUL.
        seconds: limit of the time; a function that ignores the alarm is killed ten seconds later.
        memory: bytes of address space that the process may allocate in addition to what it has.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        limit = _address_space() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            with limited(seconds):
                answer = function()
        except BaseException:
            answer = f"Traceback\n{traceback.format_exc()}"
        with os.fdopen(writing, "w", encoding="utf-8", errors="replace") as pipe:
            pipe.write(answer + "\0")
        os._exit(0)
    os.close(writing)
    watchdog = _kill_after(child, seconds + 10)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    os.kill(watchdog, signal.SIGKILL)
    os.waitpid(watchdog, 0)
    complete, end, _ = text.partition("\0")
    return complete if end else f"Traceback: the process died (status {status})"


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _kill_after(process: int, seconds: int) -> int:
    """Process that kills ``process`` after ``seconds``."""
    watchdog = os.fork()
    if watchdog == 0:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os._exit(0)
    return watchdog


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Context manager that raises TimeoutError in the main thread after ``seconds``."""

    def expired(*_: object) -> None:
        raise TimeoutError(f"not finished after {seconds} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
