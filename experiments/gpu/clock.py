"""Callbacks that a measured training gets from its config: step time, host time, waits and memory on the GPU."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar

import pytorch_lightning as pl
import torch
from annotated_types import Ge, Gt
from pytorch_lightning.callbacks import Callback

from experiments.gpu.waits import WaitingLines
from sdtune.files import write_json

GIB = 2**30

RESULT = Path("samples") / "clock.json"
"""File of :class:`Clock` in the run folder; sdtune passes callbacks the folder of the samples."""

CONTEXT = 0.5
"""GiB that a CUDA context and its kernels take on a GPU next to torch's allocator; an estimate."""


class Clock(Callback):
    """Measure the micro-batches of a training, write :data:`RESULT`, and end the process.

    Ending the process skips the artifact and the checkpoint, which take longer than the steps. The micro-batches after
    ``warm_up`` are divided: ``timed`` ones run freely between two synchronizations, for the step time; before each of
    the ``issued`` ones the GPU is idle, so that the host never waits for a full queue; ``watched`` ones count the
    lines that wait for the GPU. All of them count for the memory.

    Args:
        folder: folder ``samples`` of the run.
    """

    priority: ClassVar[int] = 1000  # after the callbacks of sdtune, whose time counts

    def __init__(
        self,
        folder: Path,
        warm_up: Annotated[int, Ge(1)] = 5,
        timed: Annotated[int, Ge(1)] = 10,
        issued: Annotated[int, Ge(1)] = 5,
        watched: Annotated[int, Ge(1)] = 2,
    ) -> None:
        self.path = folder / RESULT.name
        self._timed_from = warm_up
        self._issued_from = warm_up + timed
        self._watched_from = self._issued_from + issued
        self._end = self._watched_from + watched
        self._number = 0
        self._started = 0.0
        self._step_seconds = 0.0
        self._host_seconds: list[float] = []
        self._peak, self._reserved = 0, 0
        self._waits = WaitingLines()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        number, now = self._number, time.perf_counter()
        self._number += 1
        if self._issued_from < number <= self._watched_from:
            self._host_seconds.append(now - self._started)
        if number == self._end:
            self._leave()
        if number in (self._timed_from, *range(self._issued_from, self._watched_from + 1)):
            torch.cuda.synchronize()
            if number == self._issued_from:
                self._step_seconds = (time.perf_counter() - self._started) / (number - self._timed_from)
            self._started = time.perf_counter()
        if number == self._watched_from:
            self._waits.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # sdtune resets the peak before each micro-batch.
        if self._number > self._timed_from:
            self._peak = max(self._peak, torch.cuda.max_memory_allocated())
            self._reserved = max(self._reserved, torch.cuda.max_memory_reserved())

    def _leave(self) -> None:
        self._waits.stop()
        result = {
            "step_ms": 1000 * self._step_seconds,
            "host_ms": 1000 * median(self._host_seconds),
            "peak_gib": self._peak / GIB,
            "reserved_gib": self._reserved / GIB,
            "waits": dict(self._waits.lines),
            "watched": self._end - self._watched_from,
        }
        write_json(self.path, result)
        sys.stdout.flush()
        os._exit(0)


class MemoryLimit(Callback):
    """Give torch's allocator no more memory than a GPU of ``gib`` GiB has next to the CUDA context.

    Attributes:
        peak, reserved: highest number of bytes that torch has allocated, and taken from the driver, at the last
            :meth:`update`.
    """

    priority: ClassVar[int] = -1000  # before sdtune resets torch's peaks

    peak: ClassVar[int] = 0
    reserved: ClassVar[int] = 0

    def __init__(self, gib: Annotated[float, Gt(CONTEXT)]) -> None:
        self.gib = gib

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (self.gib - CONTEXT) * GIB / total))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.update()

    @classmethod
    def update(cls) -> None:
        """Read torch's peaks of this process."""
        cls.peak = max(cls.peak, torch.cuda.max_memory_allocated())
        cls.reserved = max(cls.reserved, torch.cuda.max_memory_reserved())
