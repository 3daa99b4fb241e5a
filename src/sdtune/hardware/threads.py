"""The number of torch's CPU threads; imports torch only to set it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

_WINDOW = 0.25
"""Seconds over which busy cores are counted."""

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def given_threads(hardware: Mapping[str, Any], kept: int | None = None) -> int | None:
    """The number of threads that is settled before any core is looked at; None where it is to be measured.

    That is ``hardware.threads``, else ``kept`` of an earlier start, else ``OMP_NUM_THREADS`` (of OpenMP's form for
    nested regions the first number).
    """
    asked = hardware.get("threads", "auto")
    if asked != "auto":
        return int(asked)
    named = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return kept or (int(named) if named.isdigit() and int(named) > 0 else None)


def free_cores() -> int:
    """Cores that this process may use and no other keeps busy now; at least 1.

    Those of its affinity, less the busy ones, and of each cgroup's quota, less what the cgroup uses. Small operations
    on more threads than there are free cores wait until each thread is scheduled, which makes a step several times
    slower.
    """
    quotas, began = _quotas(), time.perf_counter()
    before = {cgroup: _cpu_seconds(cgroup) for cgroup in quotas}
    free = [len(affinity()) - busy_cores()]
    seconds = time.perf_counter() - began
    for cgroup, quota in quotas.items():
        free.append(int(quota) - round((_cpu_seconds(cgroup) - before[cgroup]) / seconds))
    return max(1, min(free))


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and its cgroups' quotas; at least 1."""
    return max(1, int(min([len(affinity()), *_quotas().values()])))


def busy_cores() -> int:
    """How many cores of this process's affinity other processes keep busy, measured while this process waits."""
    usage = psutil.cpu_percent(_WINDOW, percpu=True)
    return round(sum(float(usage[core]) for core in affinity() if core < len(usage)) / 100)


def affinity() -> list[int]:
    """The cores that this process may be scheduled on, by index."""
    return psutil.Process().cpu_affinity() if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def _quotas() -> dict[Path, float]:
    """CPU limits in cores, by cgroup folder: this process's cgroup and its parents, where they have a limit."""
    found = {cgroup: _quota(cgroup) for cgroup in _cgroups()}
    return {cgroup: cores for cgroup, cores in found.items() if cores is not None}


def _cgroups() -> Iterator[Path]:
    """The folders of this process's cgroup and of those above it: of version 2, and of version 1's controller cpu."""
    lines = OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top, parts = CGROUP / "cpu" if controllers else CGROUP, path.strip("/").split("/")
        yield from (top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def _quota(cgroup: Path) -> float | None:
    try:
        granted, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            granted, period = ((cgroup / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    return None if granted == "max" or int(granted) <= 0 else int(granted) / int(period)


def _cpu_seconds(cgroup: Path) -> float:
    """CPU time of all processes of ``cgroup`` so far; 0 where it is not counted."""
    try:
        return int((cgroup / "cpu.stat").read_text().split("usage_usec")[1].split()[0]) / 1e6
    except (OSError, IndexError):
        try:
            return int((cgroup / "cpuacct.usage").read_text()) / 1e9
        except OSError:
            return 0.0


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
