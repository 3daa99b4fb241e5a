"""Faster settings of torch's CUDA libraries during a training."""

from __future__ import annotations

from typing import ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from sdtune.data import ImageDataModule


class CudaBackends(Callback):
    """Turn on ``cudnn.benchmark`` if all batches have one size, and TF32 for a training in float32.

    Neither with ``trainer.deterministic=true``. Matrix products in TF32 are several times faster and have 10 bits of
    mantissa instead of 23; torch uses TF32 for convolutions by default.

    Only ``TrainRun`` adds this callback: it configures torch for the process, which a library must not do.

    Args:
        benchmark: the configured ``trainer.benchmark``; None: depends on the data.
    """

    priority: ClassVar[int] = 200

    def __init__(self, benchmark: bool | None) -> None:
        self.benchmark = benchmark
        self._before: tuple[bool, str] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.root_device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
            return
        self._before = (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision())
        data = getattr(trainer, "datamodule", None)
        if self.benchmark is None and isinstance(data, ImageDataModule):
            torch.backends.cudnn.benchmark = len(data.buckets(data.train)) == 1
        if str(trainer.precision) == "32-true":
            torch.set_float32_matmul_precision("high")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            torch.backends.cudnn.benchmark = self._before[0]
            torch.set_float32_matmul_precision(self._before[1])
            self._before = None
