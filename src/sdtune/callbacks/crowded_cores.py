"""Warns if other programs take CPU time from a training on the CPU."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from sdtune.hardware.threads import affinity, usable_cores
from sdtune.quoting import shell_override

log = logging.getLogger("sdtune")

_SECONDS = 3.0
"""The shortest time over which the cores are looked at."""

_IN_A_ROW = 2
"""How many times in a row the cores must be crowded before the warning."""

_GOT, _BUSY = 0.7, 0.9
"""Crowded: the run gets less than ``_GOT`` of what its threads could use, of cores that are busier than ``_BUSY``."""

_OTHERS = 0.5
"""Crowded: other processes keep at least so many cores busy; a run's own data workers do not count."""


@dataclass(frozen=True)
class CpuSeconds:
    """CPU time so far, in seconds.

    Args:
        clock: of the wall.
        run: of this process, whose threads compute the steps.
        workers: of the processes that it has started.
        all: of everything on the cores of this process's affinity.
    """

    clock: float
    run: float
    workers: float
    all: float

    @classmethod
    def now(cls) -> CpuSeconds:
        own = psutil.Process()
        workers = 0.0
        for child in own.children(recursive=True):
            try:
                workers += _seconds(child.cpu_times())
            except psutil.NoSuchProcess:
                continue
        cores = psutil.cpu_times(percpu=True)
        busy = [sum(cores[core]) - _idle(cores[core]) for core in affinity() if core < len(cores)]
        return cls(time.perf_counter(), _seconds(own.cpu_times()), workers, sum(busy))

    def since(self, before: CpuSeconds) -> Load:
        """The cores used since ``before``."""
        seconds = self.clock - before.clock
        # A worker that has ended takes its time with it.
        workers = max(0.0, self.workers - before.workers)
        run, busy = self.run - before.run, self.all - before.all
        return Load(run / seconds, busy / seconds, max(0.0, busy - run - workers) / seconds)


@dataclass(frozen=True)
class Load:
    """Cores in use: by the run's own threads, by everything, and by other processes."""

    run: float
    all: float
    others: float


def _seconds(times: Any) -> float:
    return float(times.user + times.system)


def _idle(times: Any) -> float:
    # Linux counts guests within user time as well.
    return float(sum(getattr(times, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice")))


class CrowdedCores(Callback):
    """Warns once if a run's threads get much less CPU time than they need because other processes use the cores.

    Threads that wait for each other at every small operation then make steps several times slower. The number is not
    changed during a run: sums over another number of threads differ in their last digits, and ``resume=`` could not
    repeat the moment of the change. A run of several processes, and one within a cgroup's quota, are not watched: which
    of the machine's busy cores are theirs is not known.

    Args:
        folder: the run's, for the command that goes on with it.
    """

    priority: ClassVar[int] = -8

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before: CpuSeconds | None = None
        self._crowded = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        alone = trainer.world_size == 1 and usable_cores() == len(affinity())
        if alone and pl_module.device.type == "cpu" and torch.get_num_threads() > 1:
            self._before = CpuSeconds.now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._before is None or time.perf_counter() - self._before.clock < _SECONDS:
            return
        now, cores, threads = CpuSeconds.now(), len(affinity()), torch.get_num_threads()
        load, self._before = now.since(self._before), now
        crowded = load.run < _GOT * min(threads, cores) and load.all > _BUSY * cores and load.others > _OTHERS
        self._crowded = self._crowded + 1 if crowded else 0
        if self._crowded == _IN_A_ROW:
            self._before = None
            self._warn(load, threads, max(1, min(threads - 1, int(cores - load.others))))

    def _warn(self, load: Load, threads: int, fewer: int) -> None:
        sweep = self.folder.parent if (self.folder.parent / "multirun.yaml").is_file() else None
        again = f"-m {shell_override('resume', sweep)}" if sweep else shell_override("resume", self.folder)
        log.warning(
            "WARNING: other processes use %.1f cores; the %d threads of this run share %.1f, and wait for each other."
            " With hardware.threads=%d it would be faster: stop it with Ctrl-C, then sdtune train %s"
            " hardware.threads=%d",
            load.others,
            threads,
            load.run,
            fewer,
            again,
            fewer,
        )
