"""Make the C allocator keep freed memory between training steps on a CPU."""

from __future__ import annotations

from typing import ClassVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sdtune.hardware.allocator import pin_allocation


class PinnedAllocation(Callback):
    """Make the C allocator keep freed memory during the training.

    Only ``TrainRun`` adds this callback: it configures the allocator of the process, which a library must not do.
    """

    priority: ClassVar[int] = 200

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pin_allocation(trainer.strategy.root_device.type)
