"""Write ``metrics.csv`` (one row per optimizer step), log the same metrics, and stop the run at NaN or infinity."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sdtune.methods.base import PARTS, Adapter, source_validation_metrics
from sdtune.runs.metrics import cut_metrics, read_metrics
from sdtune.training.collective import gathered


class NotFinite(Exception):
    """A loss or gradient of a step was NaN or infinite."""


class MetricsRecorder(Callback):
    """Collect metrics on the device and copy them to the CPU every ``trainer.log_every_n_steps`` steps.

    One synchronization then serves many steps. ``metrics.csv`` has only reproducible values, so that the file of a
    resumed run equals that of an uninterrupted run; speeds go to the loggers and to ``metrics.json``.
    """

    priority: ClassVar[int] = -20

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.csv"
        self.pending: list[tuple[int, dict[str, Tensor], dict[str, float], list[str]]] = []
        self.columns: list[str] = []
        self.step_seconds: list[float] = []
        self._earlier_step_seconds: list[float] = []
        self.validation: dict[int, float] = {}
        self._last_flush = (0, 0.0)
        self._saved_columns: list[str] = []
        self._prompts: list[str] = []
        self._validation_columns: list[str] = ["validation_loss"]
        self._cut_at = -1
        self._validating = ExitStack()
        self.stop_requested = False
        """Whether the run will stop and save after this step; set by the callback ``Checkpoints``."""
        self.validation_aborted = False
        """Whether the run stops in the current validation, which has no result; set by ``Checkpoints``."""

    # --- rows

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        self._validation_columns = ["validation_loss", *source_validation_metrics(trainer)]
        # on_train_start is not called for a complete run that is resumed for its metrics only.
        self._forget_after(trainer.max_steps, trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forget_after(trainer.global_step, trainer)
        self._last_flush = (trainer.global_step, time.perf_counter())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._prompts = []
        self._prompts += batch["prompts"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Adapter)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        rates = {f"lr/{g.get('name', i)}": g["lr"] for i, g in enumerate(trainer.optimizers[0].param_groups)}
        self.pending.append(
            (trainer.global_step, dict(pl_module.step_metrics), self._applied_rates(rates, trainer), self._prompts)
        )
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % interval == 0 or trainer.global_step == trainer.max_steps:
            self.flush(trainer, pl_module)

    @staticmethod
    def _applied_rates(rates: dict[str, float], trainer: pl.Trainer) -> dict[str, float]:
        # The schedule has already advanced to the next step, so compute the rate of this step again.
        schedule = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        step = trainer.global_step - 1
        return {
            name: float(base) * factor(step)
            for name, base, factor in zip(rates, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        }

    def flush(self, trainer: pl.Trainer, module: Adapter) -> None:
        """Copy the pending metrics to the CPU, write and log them.

        Raises:
            NotFinite: a loss or gradient is NaN or infinite.
        """
        if not self.pending:
            return
        keys = list(self.pending[0][1])
        table = torch.stack([torch.stack([f[k].float() for k in keys]) for _, f, _, _ in self.pending])
        local_losses = table[:, keys.index("loss")].tolist()
        if trainer.world_size > 1:
            table = trainer.strategy.reduce(table, reduce_op="mean")
        rows: list[dict[str, Any]] = []
        for (step, _, rates, prompts), values, loss in zip(self.pending, table.tolist(), local_losses, strict=True):
            row = with_means(dict(zip(keys, values, strict=True)))
            if row.pop("finite") < 1 or row["loss"] != row["loss"]:
                self._append(rows, trainer)
                self.pending = []
                captions = suspect_captions(gathered(trainer, (math.isfinite(loss), sorted(set(prompts)))))
                raise NotFinite(
                    f"step {step}: the loss or its gradient is not finite (captions of its samples:"
                    f" {_shortened(captions)}); lower optimizer.lr or check those images"
                )
            rows.append({"step": step, **row, **rates})
        self.pending = []
        self._append(rows, trainer)
        self._log(rows, trainer, module)

    def _log(self, rows: list[dict[str, Any]], trainer: pl.Trainer, module: Adapter) -> None:
        first, start = self._last_flush
        now, last = time.perf_counter(), int(rows[-1]["step"])
        seconds = (now - start) / max(1, last - first)
        self._last_flush = (last, now)
        self.step_seconds.append(seconds)
        speed = trainer.datamodule.batch_size / seconds  # type: ignore[attr-defined]
        module.displayed_metrics = {**{k: v for k, v in rows[-1].items() if v is not None}, "samples_per_second": speed}
        for row in rows:
            for logger in trainer.loggers:
                logger.log_metrics(
                    {k: v for k, v in row.items() if k != "step" and v is not None} | {"samples_per_second": speed},
                    step=int(row["step"]),
                )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager that excludes the time inside it (samples, checkpoints, validation) from the step times."""
        start = time.perf_counter()
        yield
        self._last_flush = (self._last_flush[0], self._last_flush[1] + time.perf_counter() - start)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating.enter_context(self.paused())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        # flush() measures the time since the last flush, so the pause must end before it.
        self._validating.close()
        if self.validation_aborted:
            return
        names = [name for name in self._validation_columns if name in trainer.callback_metrics]
        values = {name: float(trainer.callback_metrics[name]) for name in names}
        if "validation_loss" in values and not trainer.sanity_checking:
            self.flush(trainer, pl_module)
            self.validation[trainer.global_step] = values["validation_loss"]
            self._append([{"step": trainer.global_step, **values}], trainer)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    def median_step_seconds(self) -> float | None:
        """Median seconds per step over all flushes; the first flush of a process, which includes warm-up, is excluded
        unless it is the only one."""
        step_seconds = self._all_step_seconds()
        return median(step_seconds) if step_seconds else None

    def _all_step_seconds(self) -> list[float]:
        return [*self._earlier_step_seconds, *self.step_seconds[1:]] or self.step_seconds

    def state_dict(self) -> dict[str, Any]:
        # The first row that a resumed run writes may be that of a validation.
        return {
            "columns": self.columns,
            "step_seconds": torch.tensor(self._all_step_seconds(), dtype=torch.float64),
            "validation": torch.tensor([*self.validation.items()], dtype=torch.float64).reshape(-1, 2),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_columns = state_dict["columns"]
        self._earlier_step_seconds = state_dict["step_seconds"].tolist()
        self.validation = {int(step): loss for step, loss in state_dict["validation"].tolist()}

    # --- the file

    def _append(self, rows: list[dict[str, Any]], trainer: pl.Trainer) -> None:
        if not rows or not trainer.is_global_zero:
            return
        is_new_file = not self.path.exists()
        if is_new_file or not self.columns:
            new_columns = self._saved_columns or [*rows[0], *self._validation_columns]
            self.columns = new_columns if is_new_file else read_metrics(self.path, "resume").columns
        with self.path.open("a", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, self.columns, restval="", lineterminator="\n")
            if is_new_file:
                writer.writeheader()
            writer.writerows({k: repr(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows)

    def _forget_after(self, step: int, trainer: pl.Trainer) -> None:
        """Remove the rows after ``step``, which a resumed run writes again, unless that has been done."""
        if step != self._cut_at:
            self.truncate(step, trainer)

    def truncate(self, step: int, trainer: pl.Trainer, keep_validation: bool = True) -> None:
        """Remove the rows that a resumed run will write again: those after ``step``, and perhaps its validation."""
        self._cut_at = step
        last = step if keep_validation else step - 1
        self.validation = {at: loss for at, loss in self.validation.items() if at <= last}
        if trainer.is_global_zero and self.path.exists():
            self.columns = cut_metrics(self.path, step, keep_validation=keep_validation)
            if not self.columns:
                self.path.unlink()


def with_means(row: Mapping[str, float]) -> dict[str, Any]:
    """Metrics of a step, where sums and counts of a metric (:data:`sdtune.methods.base.PARTS`) become its mean.

    The mean is None, an empty cell, if no sample of the step belongs to the metric's source.
    """
    total, count = PARTS
    means: dict[str, Any] = {key: value for key, value in row.items() if not key.endswith(PARTS)}
    for key in [key.removesuffix(total) for key in row if key.endswith(total)]:
        means[key] = row[f"{key}{total}"] / row[f"{key}{count}"] if row[f"{key}{count}"] else None
    return means


def suspect_captions(of_processes: Sequence[tuple[bool, list[str]]]) -> list[str]:
    """Captions of the processes whose own loss is not finite; of all processes if only a gradient is not finite.

    Args:
        of_processes: for each process, whether its loss is finite, and its captions.
    """
    failed = [captions for is_finite, captions in of_processes if not is_finite]
    return sorted({caption for captions in failed or [c for _, c in of_processes] for caption in captions})


def _shortened(prompts: list[str], count: int = 4) -> str:
    more = f" and {len(prompts) - count} more" if len(prompts) > count else ""
    return f"{'; '.join(prompts[:count])}{more}"
