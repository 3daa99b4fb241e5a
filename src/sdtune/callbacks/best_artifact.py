"""Early stopping on the validation loss, and export of the weights with the lowest validation loss."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import pytorch_lightning as pl
import torch
from annotated_types import Ge

from sdtune.callbacks.checkpoints import is_intact
from sdtune.callbacks.validation_set import check_held_out
from sdtune.methods.base import Adapter
from sdtune.runs.layout import BEST
from sdtune.training.weight_swap import swapped_parameters

log = logging.getLogger("sdtune")


class EarlyStopping(pl.callbacks.EarlyStopping):
    """Stop the training when the validation loss no longer improves.

    Args:
        patience: number of validations in a row without a new lowest loss.
        min_delta: minimum decrease that counts as an improvement.
    """

    needs_validation_set = True

    def __init__(self, patience: Annotated[int, Ge(1)] = 5, min_delta: Annotated[float, Ge(0)] = 0.0) -> None:
        super().__init__("validation_loss", min_delta=min_delta, patience=patience, verbose=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check, before any weights are loaded, that there is a validation loss to monitor.

        Raises:
            UserError: no images are held out.
        """
        check_held_out(trainer, pl_module, "callbacks.early_stopping")
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that is being stopped aborts its validation, whose loss is then that of a few batches.
        if not trainer.should_stop:
            super().on_validation_end(trainer, pl_module)


def write_best(adapter: Adapter, run: Path, name: str) -> None:
    """Write ``<name>-best`` next to the artifact, from the checkpoint with the lowest validation loss, if any."""
    file = run / "checkpoints" / BEST
    if not file.is_file():
        return
    if not is_intact(file):
        log.warning("WARNING: %s is damaged, so there is no %s-best", file, name)
        return
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    # If the run has an EMA, the validation used the averaged weights.
    averages = [state["shadow"] for state in checkpoint["callbacks"].values() if "shadow" in state]
    with swapped_parameters(adapter, averages[0] if averages else checkpoint["state_dict"]):
        adapter.snapshot(run / "artifact", f"{name}-best", "-best")
