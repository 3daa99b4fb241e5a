"""Intermediate artifacts: ``<name>-step00000400.safetensors`` and its row of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
from annotated_types import Ge
from pytorch_lightning.callbacks import Callback

from sdtune.callbacks.samples import Samples
from sdtune.methods.base import Adapter


class Snapshots(Callback):
    """Writes the artifact every ``every_steps`` optimizer steps, so that the best moment can be picked by eye."""

    def __init__(self, folder: Path, name: str, every_steps: Annotated[int, Ge(1)], samples: Samples | None) -> None:
        self.folder, self.name, self.every_steps, self.samples = folder, name, every_steps, samples

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Adapter)
        boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not boundary or trainer.global_step % self.every_steps or not trainer.is_global_zero:
            return
        mark = f"-step{trainer.global_step:08d}"
        stem = self.name + mark
        with pl_module.final_weights():
            pl_module.snapshot(self.folder / "artifact", stem, mark)
        if self.samples is not None:
            self.samples.save(trainer, pl_module, self.folder / "samples" / f"{stem}.png")
