"""Progress bar: step, loss, learning rate, validation loss, samples per second, time left."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sdtune.methods.base import Adapter
from sdtune.progress import NOT_ON_CONSOLE, Bar

log = logging.getLogger("sdtune")


_LOG_LINES = 10
"""Number of log lines per run, at most."""

_WIDE = 110
"""Columns from which the bar also has the samples per second."""


class ProgressBar(Callback):
    """Progress bar on stderr of process 0; if it is not shown, a few log lines instead."""

    priority: ClassVar[int] = -5

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._logged = 0
        self._validation_loss: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._logged = trainer.global_step
        self._bar = Bar("Training", trainer.max_steps, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None:
            return
        assert isinstance(pl_module, Adapter)
        row = pl_module.displayed_metrics
        metrics = self._metrics(row, all_of_them=not self._bar.is_shown or self._bar.width >= _WIDE) if row else ""
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        every = -(-trainer.max_steps // (_LOG_LINES * interval)) * interval
        due = trainer.global_step % every == 0 or trainer.global_step == trainer.max_steps
        if due and trainer.global_step > self._logged and trainer.max_steps >= _LOG_LINES and metrics:
            self._logged = trainer.global_step
            self._log(f"step {trainer.global_step} of {trainer.max_steps}: {metrics}")
        self._bar.update(trainer.global_step, metrics)

    def _metrics(self, row: Mapping[str, float], *, all_of_them: bool) -> str:
        rates = {key: value for key, value in row.items() if key.startswith("lr/")}
        rate = rates.get("lr/denoiser", next(iter(rates.values())))
        texts = [f"loss {row['loss']:.4f}", f"lr {rate:.1e}"]
        texts += [f"{row['samples_per_second']:.1f} images/s"] if all_of_them else []
        texts += [f"val {self._validation_loss:.4f}"] if self._validation_loss is not None else []
        return "  ".join(texts)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get("validation_loss")
        if value is None or not trainer.is_global_zero:
            return
        self._validation_loss = float(value)
        self._log(f"step {trainer.global_step} of {trainer.max_steps}: validation loss {value:.4f}")

    def _log(self, line: str) -> None:
        """Write ``line`` to the log file; to the console only if it shows no bar."""
        is_shown = self._bar is not None and self._bar.is_shown
        log.info("%s", line, extra={NOT_ON_CONSOLE: is_shown})

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.close(keep=True)
            self._bar = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()
