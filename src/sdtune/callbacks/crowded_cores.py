"""Warns if other programs take CPU time from a training on the CPU."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from sdtune.quoting import shell_override

log = logging.getLogger("sdtune")

_SECONDS = 3.0
"""The shortest time over which the cores are looked at."""

_CROWDED = 2
"""So many times in a row before anything is said."""

_GOT, _BUSY = 0.7, 0.9
"""Shares: of its threads that a run gets at most, and of the machine that is busy at least."""


class CrowdedCores(Callback):
    """Warns once if a run's threads get much less CPU time than they need while the machine is busy.

    Threads that wait for each other at every small operation then make steps several times slower. The number is not
    changed during a run: sums over another number of threads differ in their last digits, and ``resume=`` could not
    repeat the moment of the change.

    Args:
        folder: the run's, for the command that goes on with it.
    """

    priority: ClassVar[int] = -8

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = psutil.Process()
        self._since: tuple[float, float] | None = None
        self._crowded = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cpu" and torch.get_num_threads() > 1 and trainer.is_global_zero:
            self._begin()

    def _begin(self) -> None:
        psutil.cpu_percent(None)
        self._since = time.perf_counter(), self._own()

    def _own(self) -> float:
        """Seconds of computing by this process so far."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._since is None or time.perf_counter() - self._since[0] < _SECONDS:
            return
        began, before = self._since
        got = (self._own() - before) / (time.perf_counter() - began)
        threads, busy = torch.get_num_threads(), psutil.cpu_percent(None) / 100
        self._crowded = self._crowded + 1 if got < _GOT * threads and busy > _BUSY else 0
        self._begin()
        if self._crowded == _CROWDED:
            self._since = None
            log.warning(
                "WARNING: other programs use the cores: this run gets %.1f of the %d that its threads need, and they"
                " wait for each other. With hardware.threads=1 it would be faster: stop it with Ctrl-C, then sdtune"
                " train %s hardware.threads=1",
                got,
                threads,
                shell_override("resume", self.folder),
            )
