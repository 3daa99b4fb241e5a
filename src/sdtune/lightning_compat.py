"""The private names of Lightning that sdtune uses, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
from lightning_fabric.utilities.types import _PATH
from pytorch_lightning.strategies import Strategy

PathLike = _PATH
"""Of a checkpoint, as Lightning's plugins are given it."""


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """The trainer of ``module``; None where there is none, for which the public property raises."""
    trainer: pl.Trainer | None = module._trainer
    return trainer


def without_module(strategy: Strategy, work: Callable[[], None]) -> None:
    """Do ``work``, in which ``strategy`` knows of no module, and so moves none."""
    module, strategy._lightning_module = strategy._lightning_module, None
    work()
    strategy._lightning_module = module
