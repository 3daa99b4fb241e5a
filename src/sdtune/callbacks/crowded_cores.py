"""Warn if other programs take CPU time from a training on the CPU."""

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

from sdtune.hardware.threads import affinity, busy_seconds, usable_cores
from sdtune.quoting import shell_override

log = logging.getLogger("sdtune")

_MIN_SECONDS = 3.0
"""Minimum length of a measurement interval."""

_IN_A_ROW = 2
"""Number of crowded intervals in a row before the warning."""

_MIN_SHARE, _MIN_LOAD = 0.7, 0.9
"""An interval is crowded if the run gets less than this share of the CPU time that its threads could use, while the
cores are busy for more than this share of the time."""

_MIN_OTHERS = 0.5
"""An interval is crowded only if other processes, without the run's data workers, use more cores than this."""


@dataclass(frozen=True)
class CpuSeconds:
    """CPU time used so far, in seconds.

    Args:
        clock: wall-clock time.
        run: CPU time of this process, whose threads compute the steps.
        workers: CPU time of its child processes.
        all: CPU time of all processes on the cores of this process's affinity.
    """

    clock: float
    run: float
    workers: float
    all: float

    @classmethod
    def now(cls) -> CpuSeconds:
        process = psutil.Process()
        workers = 0.0
        for child in process.children(recursive=True):
            try:
                workers += _seconds(child.cpu_times())
            except psutil.NoSuchProcess:
                continue
        cores = psutil.cpu_times(percpu=True)
        busy = [busy_seconds(cores[core]) for core in affinity() if core < len(cores)]
        return cls(time.perf_counter(), _seconds(process.cpu_times()), workers, sum(busy))

    def since(self, before: CpuSeconds) -> Load:
        """Average number of cores in use since ``before``."""
        seconds = self.clock - before.clock
        # The time of a worker that has ended is no longer counted, so the difference can be negative.
        workers = max(0.0, self.workers - before.workers)
        run, busy = self.run - before.run, self.all - before.all
        return Load(run / seconds, busy / seconds, max(0.0, busy - run - workers) / seconds)


@dataclass(frozen=True)
class Load:
    """Average number of cores in use: by the threads of the run, by all processes, and by other processes."""

    run: float
    all: float
    others: float


def _seconds(times: Any) -> float:
    return float(times.user + times.system)


class CrowdedCores(Callback):
    """Warn once if the threads of the run get much less CPU time than they need because other processes use the cores.

    The threads wait for each other in every small operation, so steps then become several times slower. The callback
    does not change the number of threads during a run: sums over a different number of threads differ in their last
    digits, and a resumed run could not repeat the change at the same step. Runs with several processes and runs under a
    cgroup CPU quota are not checked, because it is unknown which of the busy cores they use.

    Args:
        folder: run folder, for the command that continues the run.
    """

    priority: ClassVar[int] = -8

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before: CpuSeconds | None = None
        self._crowded = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        measurable = trainer.world_size == 1 and usable_cores() == len(affinity())
        if measurable and pl_module.device.type == "cpu" and torch.get_num_threads() > 1:
            self._before = CpuSeconds.now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._before is None or time.perf_counter() - self._before.clock < _MIN_SECONDS:
            return
        now, cores, threads = CpuSeconds.now(), len(affinity()), torch.get_num_threads()
        load, self._before = now.since(self._before), now
        crowded = (
            load.run < _MIN_SHARE * min(threads, cores) and load.all > _MIN_LOAD * cores and load.others > _MIN_OTHERS
        )
        self._crowded = self._crowded + 1 if crowded else 0
        if self._crowded == _IN_A_ROW:
            self._before = None
            self._warn(load, threads, max(1, min(threads - 1, int(cores - load.others))))

    def _warn(self, load: Load, threads: int, suggested_threads: int) -> None:
        sweep = self.folder.parent if (self.folder.parent / "multirun.yaml").is_file() else None
        resume_option = f"-m {shell_override('resume', sweep)}" if sweep else shell_override("resume", self.folder)
        log.warning(
            "WARNING: other processes use %.1f cores; the %d threads of this run get only %.1f;"
            " %d thread(s) would be faster: press Ctrl-C and continue with: sdtune train %s hardware.threads=%d",
            load.others,
            threads,
            load.run,
            suggested_threads,
            resume_option,
            suggested_threads,
        )
