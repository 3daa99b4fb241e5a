"""Memory that nothing refers to, given back: what comes next would find it short, or count it as its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


def release() -> None:
    """To the device and, where the C library is glibc, to the system. Imports no torch where nothing else has."""
    gc.collect()  # a trainer and its model refer to each other
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
