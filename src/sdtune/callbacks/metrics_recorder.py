"""Writes ``metrics.csv``, one row per optimizer step, logs the same metrics, and stops on NaN."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sdtune.files import write_text
from sdtune.methods.base import Adapter


class NotFinite(Exception):
    """A loss or gradient of a step was NaN or infinite."""


class MetricsRecorder(Callback):
    """Keeps metrics on the device and brings them over every ``trainer.log_every_n_steps``: one wait for many steps.

    ``metrics.csv`` holds what is a function of the run alone, so that a resumed run's file equals an unbroken one's;
    speeds go to the loggers and to ``metrics.json``.
    """

    priority: ClassVar[int] = -20

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.csv"
        self.pending: list[tuple[int, dict[str, Tensor], dict[str, float], list[str]]] = []
        self.columns: list[str] = []
        self.step_seconds: list[float] = []
        self._earlier: list[float] = []
        self.samples = 0
        self.validation: dict[int, float] = {}
        self._since = (0, 0.0)
        self._prompts: list[str] = []
        self._validating = ExitStack()

    # --- rows

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.cut(trainer.max_steps, trainer)  # a complete run, resumed for its metrics alone, never starts to train

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.cut(trainer.global_step, trainer)
        self._since = (trainer.global_step, time.perf_counter())

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
            (trainer.global_step, dict(pl_module.step_metrics), self._used(rates, trainer), self._prompts)
        )
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 or trainer.global_step == trainer.max_steps:
            self.flush(trainer, pl_module)

    @staticmethod
    def _used(rates: dict[str, float], trainer: pl.Trainer) -> dict[str, float]:
        # By now the schedule has moved on to the next step's rate; the one that was used is in its record.
        schedule = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        step = trainer.global_step - 1
        return {
            name: float(base) * factor(step)
            for name, base, factor in zip(rates, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        }

    def flush(self, trainer: pl.Trainer, module: Adapter) -> None:
        """Bring the pending metrics over, write them, and stop the run if one of them is not finite."""
        if not self.pending:
            return
        keys = list(self.pending[0][1])
        table = torch.stack([torch.stack([f[k].float() for k in keys]) for _, f, _, _ in self.pending])
        if trainer.world_size > 1:
            table = trainer.strategy.reduce(table, reduce_op="mean")
        rows: list[dict[str, float]] = []
        for (step, _, rates, prompts), values in zip(self.pending, table.tolist(), strict=True):
            row = dict(zip(keys, values, strict=True))
            if row.pop("finite") < 1 or row["loss"] != row["loss"]:
                self._append(rows, trainer)
                self.pending = []
                raise NotFinite(
                    f"step {step}: the loss or its gradient is not finite (captions of its samples:"
                    f" {_first(sorted(set(prompts)))}); lower optimizer.lr, or look at those images"
                )
            rows.append({"step": step, **row, **rates})
        self.pending = []
        self._append(rows, trainer)
        self._log(rows, trainer, module)

    def _log(self, rows: list[dict[str, float]], trainer: pl.Trainer, module: Adapter) -> None:
        first, began = self._since
        now, last = time.perf_counter(), int(rows[-1]["step"])
        seconds = (now - began) / max(1, last - first)
        self._since = (last, now)
        self.step_seconds.append(seconds)
        speed = trainer.datamodule.batch_size / seconds  # type: ignore[attr-defined]
        module.flushed = {**rows[-1], "samples_per_second": speed}
        for row in rows:
            for logger in trainer.loggers:
                logger.log_metrics(
                    {k: v for k, v in row.items() if k != "step"} | {"samples_per_second": speed}, step=int(row["step"])
                )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the step times what is done within (samples, checkpoints, validation)."""
        began = time.perf_counter()
        yield
        self._since = (self._since[0], self._since[1] + time.perf_counter() - began)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating.enter_context(self.paused())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        # The flush below takes the time since the last one, so the pause must be over by then.
        self._validating.close()
        value = trainer.callback_metrics.get("validation_loss")
        if value is not None and not trainer.sanity_checking:
            self.flush(trainer, pl_module)
            self.validation[trainer.global_step] = float(value)
            self._append([{"step": trainer.global_step, "validation_loss": float(value)}], trainer)
            for logger in trainer.loggers:
                logger.log_metrics({"validation_loss": float(value)}, step=trainer.global_step)

    def median_step_seconds(self) -> float | None:
        """Median over the run's flushes; a process's first, which holds warm-up, only counts if it is alone."""
        times = self._times()
        return median(times) if times else None

    def _times(self) -> list[float]:
        return [*self._earlier, *self.step_seconds[1:]] or self.step_seconds

    def state_dict(self) -> dict[str, Any]:
        return {"step_seconds": torch.tensor(self._times(), dtype=torch.float64)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = state_dict["step_seconds"].tolist()

    # --- the file

    def _append(self, rows: list[dict[str, float]], trainer: pl.Trainer) -> None:
        if not rows or not trainer.is_global_zero:
            return
        fresh = not self.path.exists()
        if fresh or not self.columns:
            self.columns = self._read()[0] if not fresh else [*rows[0], "validation_loss"]
        with self.path.open("a", newline="") as handle:
            writer = csv.DictWriter(handle, self.columns, restval="", lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerows({k: repr(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a process killed while it wrote leaves a torn line at the end
        reader = csv.DictReader(io.StringIO(whole))
        rows = list(reader)
        return list(reader.fieldnames or []), rows

    def cut(self, step: int, trainer: pl.Trainer) -> None:
        """Drop the rows behind ``step``, which a resumed run is about to make again."""
        if not self.path.exists():
            return
        self.columns, rows = self._read()
        rows = [row for row in rows if int(row["step"]) <= step]
        self.validation = {int(r["step"]): float(r["validation_loss"]) for r in rows if r["validation_loss"]}
        if not trainer.is_global_zero:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())


def _first(prompts: list[str], count: int = 4) -> str:
    more = f" and {len(prompts) - count} more" if len(prompts) > count else ""
    return f"{'; '.join(prompts[:count])}{more}"
