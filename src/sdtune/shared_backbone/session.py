"""A training run that shares its backbone with others: what differs from a run of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers import UNet2DConditionModel
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor

from sdtune.backbone import Pretrained
from sdtune.callbacks.checkpoints import Checkpoints
from sdtune.callbacks.progress_bar import ProgressBar
from sdtune.lightning_compat import without_module
from sdtune.methods.base import Adapter
from sdtune.shared_backbone.batched_unet import Mode, default_dtype
from sdtune.shared_backbone.padding import Pair
from sdtune.shared_backbone.pool import Back, Forward, Pool, Shared
from sdtune.shared_backbone.step_coordinator import JoinCall, PendingCall, StepCoordinator


class Sharing:
    """A group's backbone, as one of its runs sees it.

    Args:
        count: how many runs move together; metrics of cost are theirs together.
    """

    def __init__(self, pool: Pool, coordinator: StepCoordinator, count: int) -> None:
        self.pool, self.coordinator, self.count = pool, coordinator, count
        self.asked: int | None = None
        """The signal by which the group was asked to stop."""
        self._begun: set[int] = set()
        self._checkpoints: dict[int, Checkpoints] = {}
        self._default = torch.get_default_dtype()

    def source(self, source: Pretrained) -> Pretrained:
        """The same backbone, whose weights are in memory once."""
        return Shared(source, self.pool, self.lora_branches, self._leaves)

    def _leaves(self) -> Callable[..., None]:
        # What is loaded behind the training is there to be measured.
        measuring = self.coordinator.here in self._begun
        return lambda *_: self.leave_if_asked(measuring)

    def measured(self) -> int | None:
        """Bytes: the peak of the steps that all take together."""
        return self.pool.peak

    def alone(self) -> dict[str, Any]:
        """The trainer's arguments that differ from the config's: a run has one device, and moves nothing of it."""
        return {"devices": 1, "num_nodes": 1, "strategy": OneDevice(self)}

    def callbacks(self, own: list[Callback], checkpoints: Checkpoints) -> list[Callback]:
        """A run's callbacks, of which ``checkpoints`` is one, with what it needs to move with the others."""
        number = self.coordinator.here
        assert number is not None
        self._checkpoints[number] = checkpoints
        # One bar tells how far all of them are.
        return [Together(self), *(each for each in own if number == 0 or not isinstance(each, ProgressBar))]

    def stop(self, number: int) -> None:
        """Have every run end its step, save and stop."""
        self.asked = number
        for checkpoints in list(self._checkpoints.values()):
            checkpoints.ask(number)

    def begin(self) -> None:
        """The run at hand takes a step, and has something to save from here on."""
        self.leave_if_asked()
        number = self.coordinator.here
        assert number is not None
        self._begun.add(number)

    def leave_if_asked(self, measuring: bool = False) -> None:
        """End the run at hand where it need not save: it has not begun, or is ``measuring`` what it has left."""
        if self.asked is not None and (measuring or self.coordinator.here not in self._begun):
            raise SystemExit(128 + self.asked)

    def left(self, number: int) -> None:
        """The run ``number`` is over."""
        self._checkpoints.pop(number, None)
        self._begun.discard(number)

    def attach(self, adapter: Adapter) -> None:
        """Have ``adapter``'s UNet and its gradients go through the one for all."""
        unet = adapter.backbone.unet
        unet.forward = self._forward(unet)
        adapter.backward = self._back  # type: ignore[method-assign]

    @contextmanager
    def lora_branches(
        self, unet: UNet2DConditionModel, pairs: Mapping[str, tuple[Tensor, Tensor, float]]
    ) -> Iterator[None]:
        """See :attr:`sdtune.backbone.backbone.Backbone.lora_branches`: ``unet`` draws with the others'."""
        device = self.pool.device
        own = {n: Pair(down.to(device), up.to(device), scale, 0.0) for n, (down, up, scale) in pairs.items()}
        unet.forward = self._forward(unet, own)
        try:
            yield
        finally:
            del unet.forward

    def _forward(self, unet: UNet2DConditionModel, pairs: Mapping[str, Pair] | None = None) -> Callable[..., Any]:
        def forward(sample: Tensor, timestep: Tensor, **more: Any) -> Any:
            kind = sample.device.type
            mode = Mode(
                torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
                unet.training,
                (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
                torch.get_default_dtype(),
            )
            inputs = {"sample": sample, "timestep": timestep.expand(len(sample)), **more}
            # The step has seeded the global generator by its place; a neighbour's turn would seed it anew.
            return self._ask(Forward(unet, inputs, mode, pairs, torch.initial_seed()))

        return forward

    def _back(self, loss: Tensor, *args: Any, **more: Any) -> None:
        self._ask(Back(loss, more))

    def _ask(self, call: PendingCall) -> Any:
        self.leave_if_asked(isinstance(call, Forward) and call.pairs is not None)
        # Lightning's 64-true and 16-true change torch's default type for a step; a neighbour moves within it.
        with default_dtype(self._default):
            return self.coordinator.ask(call)


class OneDevice(SingleDeviceStrategy):
    """Leaves the weights that are shared where they are, when a run begins and when it ends."""

    def __init__(self, sharing: Sharing) -> None:
        super().__init__(sharing.pool.device)
        self._sharing = sharing

    def model_to_device(self) -> None:
        assert isinstance(self.model, Adapter)
        self._sharing.pool.settle(self.model)
        self._sharing.attach(self.model)

    def teardown(self) -> None:
        without_module(self, super().teardown)


class Together(Callback):
    """From the first step on, a run moves with the others."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sharing.coordinator.ask(JoinCall())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._sharing.begin()
