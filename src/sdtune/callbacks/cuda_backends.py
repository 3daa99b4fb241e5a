"""Faster settings of torch's CUDA libraries during a training."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from sdtune.data import ImageDataModule


class CudaBackends(Callback):
    """Turn on ``cudnn.benchmark`` if all images have one training size, and TF32 for a training in float32.

    Neither with ``trainer.deterministic=true``. Matrix products in TF32 are several times faster and have 10 bits of
    mantissa instead of 23; torch uses TF32 for convolutions by default.

    Only ``TrainRun`` adds this callback: it configures torch for the process, which a library must not do. Runs that
    share a backbone train in one process: the settings of torch are restored when the last of them ends.

    Args:
        benchmark: the configured ``trainer.benchmark``; None: depends on the data.
    """

    priority: ClassVar[int] = 200

    _training: ClassVar[list[CudaBackends]] = []
    _before: ClassVar[tuple[bool, str]] = (False, "highest")

    def __init__(self, benchmark: bool | None) -> None:
        self.benchmark = benchmark
        self._has_one_size = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.root_device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
            return
        if not self._training:
            CudaBackends._before = (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision())
        self._training.append(self)
        data = getattr(trainer, "datamodule", None)
        assert isinstance(data, ImageDataModule)
        sizes = np.concatenate([data.entries.sizes, data.held_out_entries.sizes])
        self._has_one_size = bool((sizes == sizes[0]).all())
        self._set_benchmark()
        if str(trainer.precision) == "32-true":
            torch.set_float32_matmul_precision("high")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _set_benchmark(self) -> None:
        if self.benchmark is None:
            torch.backends.cudnn.benchmark = all(run._has_one_size for run in self._training)

    def _restore(self) -> None:
        if self not in self._training:
            return
        self._training.remove(self)
        if self._training:
            self._set_benchmark()
        else:
            torch.backends.cudnn.benchmark = self._before[0]
            torch.set_float32_matmul_precision(self._before[1])
