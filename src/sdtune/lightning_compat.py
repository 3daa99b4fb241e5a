"""All private names of Lightning that sdtune uses."""

from __future__ import annotations

import pytorch_lightning as pl
from lightning_fabric.utilities.types import _PATH

PathLike = _PATH
"""Type of a checkpoint path in Lightning's plugin interfaces."""


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """Trainer of ``module``, or None if none is attached (the public property raises then)."""
    trainer: pl.Trainer | None = module._trainer
    return trainer
