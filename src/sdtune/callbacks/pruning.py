"""Pruning: stop a job of an Optuna sweep whose validation loss is worse than that of the other jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
from annotated_types import Ge
from pytorch_lightning.callbacks import Callback

from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.callbacks.validation_set import check_held_out
from sdtune.errors import Pruned
from sdtune.runs.trials import job_trial, require_optuna


class Pruning(Callback):
    """Report each validation loss to the job's Optuna trial (``sweep=optuna``); stop the job if the pruner decides so.

    The pruner compares validation losses, whichever metric the search optimizes, because the evaluation metrics are
    measured only at the end of a run.

    Args:
        run: folder of the job in the sweep folder.
        record: recorder of the validation losses.
        trial: number of the Optuna trial; None: the callback does nothing.
        pruner: ``median`` stops a trial that is worse than the median of the earlier trials at the same step; ``asha``
            (Li et al. 2020) continues only the best third of the trials at the steps s, 3s, 9s, ...
        after: ``median``: number of trials that run to the end before any is pruned (None: 4); ``asha``: the first step
            s (None: the step of the first validation; a smaller s would prune several times at that validation).
    """

    needs_validation_set = True

    def __init__(
        self,
        run: Path,
        record: MetricsRecorder,
        trial: int | None,
        pruner: Literal["median", "asha"] = "median",
        after: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        require_optuna()
        self.run, self.record, self.number, self.kind, self.after = run, record, trial, pruner, after
        self._trial: Any = None
        self._sign = 1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        import optuna

        check_held_out(trainer, pl_module, "callbacks.pruning")
        if self.number is not None and trainer.is_global_zero:
            pruner = (
                optuna.pruners.MedianPruner(n_startup_trials=self.after or 4)
                if self.kind == "median"
                else optuna.pruners.SuccessiveHalvingPruner(
                    min_resource=self.after or _first_validation(trainer), reduction_factor=3
                )
            )
            self._trial = job_trial(self.run.parent, self.number, pruner)
            # The study's direction is that of the final metric; for a loss, lower is always better.
            self._sign = 1 if self._trial.study.direction == optuna.study.StudyDirection.MINIMIZE else -1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.record.validation_aborted:
            return
        value = self.record.validation.get(trainer.global_step)
        prune = False
        if self._trial is not None and value is not None and not trainer.sanity_checking:
            self._trial.report(self._sign * value, trainer.global_step)
            prune = bool(self._trial.should_prune())
        if trainer.world_size > 1:
            prune = bool(trainer.strategy.reduce_boolean_decision(prune, all=False))
        if prune and trainer.global_step < trainer.max_steps:
            raise Pruned(trainer.global_step)


def _first_validation(trainer: pl.Trainer) -> int:
    """Optimizer step of the first validation; Lightning counts micro-batches."""
    interval = trainer.val_check_interval
    return max(1, interval // trainer.accumulate_grad_batches) if isinstance(interval, int) else 1
