"""Map errors of a command to one-line messages and exit codes."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sdtune.errors import PRUNED, STOPPED, Pruned, RunFailed, Stopped, UserError
from sdtune.hardware.out_of_memory import ADVICE, is_out_of_memory
from sdtune.hardware.processes import is_global_zero

EXIT_FAILED = 1
EXIT_INVALID_INPUT = 2
"""Exit code for invalid input; nothing was done."""

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Errors of writing to an open file; the operating system does not report the file name for them."""


def refuse(message: str, code: int = EXIT_INVALID_INPUT) -> NoReturn:
    """Print ``message`` to stderr as one line and exit with ``code``."""
    _print_line(message)
    raise SystemExit(code)


def _print_line(message: str) -> None:
    print(f"sdtune: {' '.join(message.split())}", file=sys.stderr)


@contextmanager
def exit_codes(command: str, composition: Callable[[Exception], str] | None = None) -> Iterator[None]:
    """Context manager that turns an error that the user can fix into one line on stderr and an exit code.

    2: :class:`UserError`, and errors of Hydra and OmegaConf while a config is composed. 1: :class:`RunFailed`, an
    ``OSError`` with an errno, and out of memory. 4: :class:`Pruned`. 128 + signal: :class:`Stopped` and Ctrl-C. Any
    other error is a bug and passes through, as all errors do under ``SDTUNE_TRACEBACK=1``.

    Args:
        command: name of the command; selects the advice for out of memory.
        composition: returns the line for an error of Hydra or OmegaConf; None if no config is composed, so that such an
            error is a bug.
    """
    try:
        yield
    except KeyboardInterrupt:
        refuse(STOPPED, 130)
    except Exception as error:
        if os.environ.get("SDTUNE_TRACEBACK") and not isinstance(error, Stopped | Pruned):
            raise
        line, code = _line_and_code(error, command, composition)
        if line is None:
            raise
        if line:
            _print_line(line)
        if code:
            raise SystemExit(code) from error


def _line_and_code(
    error: Exception, command: str, composition: Callable[[Exception], str] | None
) -> tuple[str | None, int]:
    """The line for ``error`` and the exit code; None for a bug, an empty line if another process prints the error."""
    if isinstance(error, UserError):
        return str(error), EXIT_INVALID_INPUT
    if composition is not None and isinstance(error, HydraException | OmegaConfBaseException):
        return composition(error), EXIT_INVALID_INPUT
    if isinstance(error, Stopped):
        return str(error), error.code
    # If another process exits with a code, Lightning kills process 0, which still has to close its loggers.
    if isinstance(error, Pruned):
        return (str(error), PRUNED) if is_global_zero() else ("", 0)
    if isinstance(error, RunFailed):
        return (str(error), EXIT_FAILED) if is_global_zero() or not error.agreed else ("", 0)
    if is_out_of_memory(error):
        return ADVICE.get(command, ADVICE["other"]), EXIT_FAILED
    if isinstance(error, OSError) and error.errno is not None:
        return _os_error_line(error), EXIT_FAILED
    # safetensors raises SafetensorError, not OSError, for a full disk, also if diffusers or transformers call it.
    if type(error).__name__ == "SafetensorError" and (match := re.search(r"\(os error (\d+)\)", str(error))):
        return _os_error_line(OSError(int(match[1]), os.strerror(int(match[1])))), EXIT_FAILED
    return None, EXIT_FAILED


def _os_error_line(error: OSError) -> str:
    if error.filename is None and error.errno not in _WRITE_ERRORS:
        return str(error.strerror)  # error of a connection, a pipe or a process
    return f"{error.filename or 'output'}: {error.strerror}; choose a location that is readable and writable"
