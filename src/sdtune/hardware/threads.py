"""The number of torch's CPU threads; imports torch only to set it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_WINDOW = 0.25
"""Seconds over which busy cores are counted."""

CGROUP = Path("/sys/fs/cgroup")


def auto_threads(processes: int = 1) -> int:
    """The threads of each of ``processes`` on this machine: ``OMP_NUM_THREADS`` where it is set, else its free cores.

    Free are the cores that this process may use, less those that are busy now; small operations on more threads than
    there are free cores wait until each thread is scheduled, which makes a step several times slower.
    """
    named = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if named.isdigit() and int(named) > 0:
        return int(named)
    return max(1, free_cores() // processes)


def free_cores() -> int:
    """Cores that this process may use and no other keeps busy now; at least 1."""
    return max(1, usable_cores() - busy_cores())


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and its cgroup's quota; at least 1."""
    cores = len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def busy_cores() -> int:
    """The number of those cores that other processes keep busy, measured while this process waits."""
    whole = psutil.cpu_percent(_WINDOW, percpu=True)
    own = psutil.Process().cpu_affinity() if sys.platform == "linux" else range(len(whole))
    return round(sum(float(whole[core]) for core in own if core < len(whole)) / 100)


def _quota() -> float | None:
    """Cores that the cgroup grants (v2, then v1); None where there is no limit."""
    try:
        granted, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            granted, period = ((CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    return None if granted == "max" or int(granted) <= 0 else int(granted) / int(period)


@contextmanager
def torch_threads(count: int) -> Iterator[int]:
    """Have torch use ``count`` CPU threads, and restore the previous number afterwards; yields ``count``."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
