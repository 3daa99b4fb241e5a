"""Peak memory of a process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Have :func:`peak_memory` count from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        # Some containers forbid it; the peak then counts from the start of the process.
        with suppress(PermissionError):
            _CLEAR_REFS.write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: on a GPU what its allocator has held, else what was resident; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if not _STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024
