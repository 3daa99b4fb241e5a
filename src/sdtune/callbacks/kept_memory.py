"""Has the C library keep freed memory between the steps of a training on a CPU."""

from __future__ import annotations

from typing import ClassVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sdtune.hardware.allocator import pin_allocation


class KeptMemory(Callback):
    """Only a ``TrainRun`` adds it: it changes the allocator of the whole process, which a library must not do."""

    priority: ClassVar[int] = 200

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pin_allocation(trainer.strategy.root_device.type)
