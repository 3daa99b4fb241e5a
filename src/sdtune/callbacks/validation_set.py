"""Check that a validation set exists, for callbacks that use the validation loss."""

from __future__ import annotations

import pytorch_lightning as pl

from sdtune.errors import UserError
from sdtune.methods.base import Adapter

NOTHING_HELD_OUT = (
    "no image is held out for validation; set data.hold_out=10 to hold out one in ten (pocket:"
    " data.validation_images=12)"
)


def check_held_out(trainer: pl.Trainer, module: pl.LightningModule, key: str) -> None:
    """Check, before any weights are loaded, that images are held out for validation.

    Raises:
        UserError: no images are held out; the message names ``key``.
    """
    assert isinstance(module, Adapter)
    data, facts = trainer.datamodule, module.source.facts  # type: ignore[attr-defined]
    data.open(facts.side, facts.factor)
    if not data.held_out:
        raise UserError(NOTHING_HELD_OUT, key=key)
