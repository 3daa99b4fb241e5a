"""Peak memory of this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that :func:`peak_memory` returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        # Some containers forbid the reset; the peak then counts from the start of the process.
        with suppress(PermissionError):
            _CLEAR_REFS.write_text("5", encoding="utf-8")


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: allocated by torch on a GPU, else resident; None if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if not _STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024
