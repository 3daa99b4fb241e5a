"""All private names of Lightning that sdtune uses."""

from __future__ import annotations

import pytorch_lightning as pl
from lightning_fabric.utilities.types import _PATH

PathLike = _PATH
"""Type of a checkpoint path in Lightning's plugin interfaces."""


def run_validation(trainer: pl.Trainer) -> None:
    """Validate before the next training step, with the same hooks and state as a validation between two steps."""
    connector = trainer._logger_connector
    first_loop_iter = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.restarting = False
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_loop_iter


def disable_sigterm_agreement(trainer: pl.Trainer) -> None:
    """Do not agree on a SIGTERM before each micro-batch.

    With several processes, Lightning waits for the device twice there. Its own handler of the signal is replaced, so
    that the answer is always no.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """Trainer of ``module``, or None if none is attached (the public property raises then)."""
    trainer: pl.Trainer | None = module._trainer
    return trainer
