"""Standard output and error without write errors: a closed terminal or pipe or a full disk does not end a run."""

from __future__ import annotations

import io
import logging
import os
import select
import sys
from typing import TextIO


class _Discarding(io.RawIOBase):
    """File that writes to the descriptor ``number``, and discards all output after the first write error."""

    def __init__(self, number: int) -> None:
        self._number = number

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def fileno(self) -> int:
        return self._number

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            return os.write(self._number, data)
        except BlockingIOError:  # another program has made the pipe or terminal non-blocking, and it is full
            select.select([], [self._number], [])
            return self.write(data)
        except OSError:
            # Nobody reads the output any more. Processes that are started later inherit the descriptor.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._number)
            os.close(null)
            return len(data)


def protect_output() -> None:
    """Replace the process's standard output and error by streams whose write errors are discarded.

    Characters that their encoding lacks are escaped. Streams that a test or a notebook has replaced are left alone.
    """
    logging.raiseExceptions = False  # a log file on a full disk would print a traceback for each line
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout = _protected(sys.stdout, 1)
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        sys.stderr = _protected(sys.stderr, 2)


def _protected(stream: TextIO, number: int) -> TextIO:
    if sys.platform == "win32" and stream.isatty():
        return stream  # Python writes to the console by its own interface, in UTF-16
    stream.flush()
    buffer = io.BufferedWriter(_Discarding(number))  # type: ignore[type-var]
    is_line_buffered = number == 2 or buffer.isatty()
    is_unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    return io.TextIOWrapper(
        buffer,
        stream.encoding,
        errors="backslashreplace",
        line_buffering=is_line_buffered or is_unbuffered,
        write_through=is_unbuffered,
    )
