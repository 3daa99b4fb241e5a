"""Memory allocator: release unused memory, or keep it between steps on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def pin_allocation(device: str) -> None:
    """From here on, where a ``device`` of that type is a CPU, have glibc's malloc keep what is freed until
    :func:`release`.

    It gives large tensors back at once, and the next step's are new pages, which the system clears one by one: of a
    step that trains SD 1.5's UNet it was a third. On a GPU torch's own allocator keeps memory likewise.
    """
    if device != "cpu":
        return
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)


def release() -> None:
    """Give it back, to the device and, where the C library is glibc, to the system: what comes next would find it
    short, or count it as its own. Imports no torch where nothing else has.
    """
    gc.collect()  # a trainer and its model refer to each other
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
