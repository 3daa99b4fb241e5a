"""The private names of Lightning that sdtune uses, and no others."""

from __future__ import annotations

import pytorch_lightning as pl
from lightning_fabric.utilities.types import _PATH

PathLike = _PATH
"""Of a checkpoint, as Lightning's plugins are given it."""


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """The trainer of ``module``; None where there is none, for which the public property raises."""
    trainer: pl.Trainer | None = module._trainer
    return trainer
