"""Number of torch's CPU threads and of free CPU cores; imports torch only to set the number."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_WINDOW = 0.25
"""Minimum time in seconds over which the CPU usage is measured."""

_MAX_WINDOW = 20.0
"""Maximum time in seconds from the import of this module over which the CPU usage is measured without sleeping."""

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def configured_threads(hardware: Mapping[str, Any], kept: int | None = None) -> int | None:
    """Configured number of threads; None if it must be measured with :func:`free_cores`.

    It is ``hardware.threads``, else ``kept`` (the number of an earlier start), else ``OMP_NUM_THREADS`` (its first
    number, if it is a list for nested parallel regions).
    """
    configured = hardware.get("threads", "auto")
    if configured != "auto":
        return int(configured)
    omp_threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return kept or (int(omp_threads) if omp_threads.isdigit() and int(omp_threads) > 0 else None)


@dataclass(frozen=True)
class CpuUsage:
    """CPU time used so far, in seconds, and the wall-clock time.

    Args:
        process: id of this process.
        own: by this process.
        cores: by all processes, on each core of this process's affinity.
        cgroups: by all processes in each cgroup with a quota that this process belongs to.
    """

    process: int
    clock: float
    own: float
    cores: dict[int, float]
    cgroups: dict[Path, float]

    @classmethod
    def now(cls) -> CpuUsage:
        used = psutil.Process().cpu_times()
        cores = {core: busy_seconds(times) for core, times in enumerate(psutil.cpu_times(percpu=True))}
        return cls(
            os.getpid(),
            time.perf_counter(),
            used.user + used.system,
            {core: cores[core] for core in affinity() if core in cores},
            {cgroup: _cpu_seconds(cgroup) for cgroup in _quotas()},
        )


def busy_seconds(times: Any) -> float:
    """Time in seconds in which a core was busy, from psutil's ``times`` of this core."""
    # Linux counts guest time twice: as guest time and within user time.
    return float(sum(times) - sum(getattr(times, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice")))


def free_cores() -> int:
    """Number of cores that this process may use and that other processes do not use now; at least 1.

    The minimum of: cores of its affinity minus those that are busy; quota of each cgroup minus its current usage. With
    more threads than free cores, each small operation waits until all threads are scheduled, which makes a step several
    times slower.

    The first call measures the usage since the import of this module, which a command imports before torch and
    diffusers; other calls sleep for :data:`_WINDOW`.
    """
    before, now = _AT_IMPORT.pop() if _AT_IMPORT else None, CpuUsage.now()
    # A forked process has its parent's measurement.
    if before is None or before.process != now.process or not _WINDOW <= now.clock - before.clock <= _MAX_WINDOW:
        time.sleep(_WINDOW)
        before, now = now, CpuUsage.now()
    seconds, own = now.clock - before.clock, now.own - before.own

    def others(used: float) -> int:
        """Average number of cores that other processes used."""
        return max(0, round((used - own) / seconds))

    quotas = _quotas()
    free = [
        len(affinity()) - others(sum(now.cores[core] - before.cores.get(core, now.cores[core]) for core in now.cores))
    ]
    free += [
        int(quotas[group]) - others(now.cgroups[group] - before.cgroups.get(group, now.cgroups[group]))
        for group in now.cgroups
    ]
    return max(1, min(free))


def usable_cores() -> int:
    """Number of cores that this process may use, by its affinity and the quotas of its cgroups; at least 1."""
    return max(1, int(min([len(affinity()), *_quotas().values()])))


def affinity() -> list[int]:
    """Indices of the cores on which this process may be scheduled."""
    return psutil.Process().cpu_affinity() if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def _quotas() -> dict[Path, float]:
    """CPU limits in cores by cgroup folder, of this process's cgroup and its parents that have a limit."""
    limits = {cgroup: _quota(cgroup) for cgroup in _cgroups()}
    return {cgroup: cores for cgroup, cores in limits.items() if cores is not None}


def _cgroups() -> Iterator[Path]:
    """Folders of this process's cgroup and its parents: of cgroup v2, and of the cpu controller of cgroup v1."""
    lines = OWN_CGROUP.read_text(encoding="utf-8").splitlines() if OWN_CGROUP.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top, parts = CGROUP / "cpu" if controllers else CGROUP, path.strip("/").split("/")
        yield from (top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def _quota(cgroup: Path) -> float | None:
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
            )
        except OSError:
            return None
    return None if quota == "max" or int(quota) <= 0 else int(quota) / int(period)


def _cpu_seconds(cgroup: Path) -> float:
    """CPU time of all processes of ``cgroup`` so far; 0 if it is not available."""
    try:
        return int((cgroup / "cpu.stat").read_text(encoding="utf-8").split("usage_usec")[1].split()[0]) / 1e6
    except (OSError, IndexError):
        try:
            return int((cgroup / "cpuacct.usage").read_text(encoding="utf-8")) / 1e9
        except OSError:
            return 0.0


@contextmanager
def torch_threads(count: int) -> Iterator[int]:
    """Context manager that sets torch's number of CPU threads to ``count`` and restores the previous one."""
    import torch

    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(previous)


_AT_IMPORT: list[CpuUsage] = []
"""CPU usage at the import of this module, until :func:`free_cores` has used it."""

with suppress(OSError, psutil.Error):  # reported when free_cores() needs it
    _AT_IMPORT.append(CpuUsage.now())
