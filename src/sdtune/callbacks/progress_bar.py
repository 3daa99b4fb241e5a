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


_LOG_LINES = 10
"""Number of log lines per run if stderr is not a terminal."""


class ProgressBar(Callback):
    """Rich progress bar on stderr of process 0; if stderr is not a terminal, a few log lines instead."""

    priority: ClassVar[int] = -5

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._is_terminal = True
        self._logged = 0
        self._validation_loss: float | None = None

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
        self._is_terminal = self._progress.console.is_terminal
        self._logged = trainer.global_step * _LOG_LINES // trainer.max_steps
        self._task = self._progress.add_task("", total=trainer.max_steps, completed=trainer.global_step, metrics="")
        self._progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None:
            return
        assert isinstance(pl_module, Adapter)
        row = pl_module.displayed_metrics
        metrics = ""
        if row:
            rates = {key: value for key, value in row.items() if key.startswith("lr/")}
            rate = rates.get("lr/unet", next(iter(rates.values())))
            metrics = f"loss {row['loss']:.4f}  lr {rate:.1e}  {row['samples_per_second']:.1f} images/s"
            if self._validation_loss is not None:
                metrics += f"  val {self._validation_loss:.4f}"
        line = trainer.global_step * _LOG_LINES // trainer.max_steps
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_logged = trainer.global_step % interval == 0 or trainer.global_step == trainer.max_steps
        if not self._is_terminal and line > self._logged and trainer.max_steps >= _LOG_LINES and metrics and is_logged:
            self._logged = line
            log.info("step %d of %d: %s", trainer.global_step, trainer.max_steps, metrics)
        self._progress.update(self._task, completed=trainer.global_step, metrics=metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get("validation_loss")
        if value is None or not trainer.is_global_zero:
            return
        self._validation_loss = float(value)
        if not self._is_terminal:
            log.info("step %d of %d: validation loss %.4f", trainer.global_step, trainer.max_steps, value)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()
