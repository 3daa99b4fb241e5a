"""Exponential moving average (EMA) of the trained weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Annotated, Any, ClassVar

import pytorch_lightning as pl
import torch
from annotated_types import Interval
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from sdtune.methods.base import Adapter
from sdtune.torch_compat import foreach_lerp_
from sdtune.training.weight_swap import swapped_parameters


class EMA(Callback):
    """Exponential moving average of the trained weights, in float32; saved in the checkpoint.

    Args:
        decay: decay per step. In early steps (1 + step) / (10 + step) is used while it is smaller, so that the initial
            weights do not dominate the average (EMA warm-up as in Karras et al. 2022 and diffusers).
    """

    priority: ClassVar[int] = -30

    def __init__(self, decay: Annotated[float, Interval(gt=0, lt=1)] = 0.999) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {}
        self._trained: list[Tensor] = []
        self._step = -1
        self._validating = ExitStack()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        pl_module.average = self
        # A resumed run has loaded its average already, on the CPU; a new run starts from the initial weights.
        trained = pl_module.trainable()
        self.shadow = {name: self.shadow.get(name, p.detach().float()).to(p.device, copy=True) for name, p in trained}
        self._trained = [p for _, p in trained]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step  # at on_fit_start a resumed run's step is not yet known

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        assert isinstance(pl_module, Adapter)
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        foreach_lerp_(list(self.shadow.values()), [p.float() for p in self._trained], 1 - decay)

    def swapped_parameters(self, module: nn.Module) -> AbstractContextManager[None]:
        """Context manager in which ``module`` has the averaged weights; on exit its own are restored exactly."""
        return swapped_parameters(module, self.shadow)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning moves the model to main memory now; the evaluation needs the device.
        self.shadow = {name: average.cpu() for name, average in self.shadow.items()}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating.enter_context(self.swapped_parameters(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._validating.close()  # restore the weights if a validation raised the exception

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shadow = dict(state_dict["shadow"])
