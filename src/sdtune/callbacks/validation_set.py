"""Checks that there is a validation set for callbacks that use the validation loss."""

from __future__ import annotations

import pytorch_lightning as pl

from sdtune.errors import UserError
from sdtune.methods.base import Adapter

NOTHING_HELD_OUT = (
    "no image is held out to judge by; give data.hold_out=10, for one in ten (on pocket data.validation_images=12)"
)


def check_held_out(trainer: pl.Trainer, module: pl.LightningModule, key: str) -> None:
    """UserError that names ``key``, before any weights are loaded, where nothing is held out."""
    assert isinstance(module, Adapter)
    data, facts = trainer.datamodule, module.source.facts  # type: ignore[attr-defined]
    data.open(facts.side, facts.factor)
    if not data.held_out:
        raise UserError(NOTHING_HELD_OUT, key=key)
