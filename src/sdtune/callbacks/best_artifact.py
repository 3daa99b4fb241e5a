"""Early stopping, and the artifact of the step with the lowest validation loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytorch_lightning as pl
import torch
from annotated_types import Ge

from sdtune.callbacks.validation_set import check_held_out
from sdtune.methods.base import Adapter
from sdtune.runs.layout import BEST
from sdtune.training.weight_swap import swapped


class EarlyStopping(pl.callbacks.EarlyStopping):
    """Ends the run when the validation loss has not fallen for a while.

    Args:
        patience: validations without a new lowest loss.
        min_delta: a smaller fall does not count.
    """

    needs_validation_set = True

    def __init__(self, patience: Annotated[int, Ge(1)] = 5, min_delta: Annotated[float, Ge(0)] = 0.0) -> None:
        super().__init__("validation_loss", min_delta=min_delta, patience=patience, verbose=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """UserError, before any weights are loaded, where nothing is held out: there would be no loss to watch."""
        check_held_out(trainer, pl_module, "callbacks.early_stopping")
        super().setup(trainer, pl_module, stage)


def write_best(adapter: Adapter, run: Path, name: str) -> None:
    """``<name>-best`` beside the artifact, from the checkpoint of the lowest validation loss, if there was any."""
    file = run / "checkpoints" / BEST
    if not file.is_file():
        return
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    # What was validated: the average, where one was kept.
    averages = [state["shadow"] for state in checkpoint["callbacks"].values() if "shadow" in state]
    with swapped(adapter, averages[0] if averages else checkpoint["state_dict"]):
        adapter.snapshot(run / "artifact", f"{name}-best", "-best")
