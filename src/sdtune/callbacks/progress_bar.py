"""Progress bar: step, loss, learning rate, samples per second, time left."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sdtune.methods.base import Adapter

log = logging.getLogger("sdtune")


_LINES = 10
"""Of a whole run, where nobody watches a bar."""


class ProgressBar(Callback):
    """A Rich bar on stderr of the first process; where that is no terminal, a line in the log now and then."""

    priority: ClassVar[int] = -5

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._watched = True
        self._said = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._progress = Progress(
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._watched = self._progress.console.is_terminal
        self._said = trainer.global_step * _LINES // trainer.max_steps
        self._task = self._progress.add_task("", total=trainer.max_steps, completed=trainer.global_step, metrics="")
        self._progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None:
            return
        assert isinstance(pl_module, Adapter)
        row = pl_module.flushed
        metrics = ""
        if row:
            rate = next(value for key, value in row.items() if key.startswith("lr/"))
            metrics = f"loss {row['loss']:.4f}  lr {rate:.1e}  {row['samples_per_second']:.1f} images/s"
        part = trainer.global_step * _LINES // trainer.max_steps
        flushed = trainer.global_step % trainer.log_every_n_steps == 0 or trainer.global_step == trainer.max_steps  # type: ignore[attr-defined]
        if not self._watched and part > self._said and trainer.max_steps >= _LINES and metrics and flushed:
            self._said = part
            log.info("step %d of %d: %s", trainer.global_step, trainer.max_steps, metrics)
        self._progress.update(self._task, completed=trainer.global_step, metrics=metrics)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()
