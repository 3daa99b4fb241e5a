"""Pruning: ends a sweep's job that falls behind the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
from annotated_types import Ge
from pytorch_lightning.callbacks import Callback

from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.callbacks.validation_set import check_held_out
from sdtune.errors import Pruned
from sdtune.runs.trials import own_trial, require_optuna


class Pruning(Callback):
    """Reports each validation loss to the job's Optuna trial (``sweep=optuna``) and ends the job if it says so.

    Whatever metric the search is for, it is the validation loss that is judged: fidelities are measured at the end.

    Args:
        run: the job's folder, in the sweep's.
        record: where the validation losses are.
        trial: the trial's number; without one nothing happens.
        pruner: ``median`` ends what is worse than the median of the trials before at the same step, ``asha``
            (Li et al. 2020) all but the best third at each of a few steps that grow threefold.
        after: trials that end by themselves first (median; 4 if None), and the first step at which one may end (asha;
            that of the first validation if None, since each threefold of it before that would be a cut as well).
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
            self._trial = own_trial(self.run.parent, self.number, pruner)
            # The study's direction is that of the metric at the end; a loss is always the better the lower.
            self._sign = 1 if self._trial.study.direction == optuna.study.StudyDirection.MINIMIZE else -1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = self.record.validation.get(trainer.global_step)
        behind = False
        if self._trial is not None and value is not None and not trainer.sanity_checking:
            self._trial.report(self._sign * value, trainer.global_step)
            behind = bool(self._trial.should_prune())
        if trainer.world_size > 1:
            behind = bool(trainer.strategy.reduce_boolean_decision(behind, all=False))
        if behind and trainer.global_step < trainer.max_steps:
            raise Pruned(trainer.global_step)


def _first_validation(trainer: pl.Trainer) -> int:
    """Its optimizer step; Lightning counts micro-batches."""
    every = trainer.val_check_interval
    return max(1, every // trainer.accumulate_grad_batches) if isinstance(every, int) else 1
