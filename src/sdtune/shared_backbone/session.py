"""A training run that shares its backbone with others: what differs from a run of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from diffusers import UNet2DConditionModel
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone, Pairs
from sdtune.callbacks.checkpoints import Checkpoints
from sdtune.callbacks.progress_bar import ProgressBar
from sdtune.methods.base import Adapter
from sdtune.shared_backbone.batched_unet import Mode, default_dtype
from sdtune.shared_backbone.padding import Pair
from sdtune.shared_backbone.pool import Back, Forward, Pool
from sdtune.shared_backbone.step_coordinator import JoinCall, PendingCall, StepCoordinator


class SharedBackbone:
    """A group's backbone, as one of its runs sees it.

    Args:
        count: how many runs move together; metrics of cost are theirs together.
    """

    def __init__(self, pool: Pool, coordinator: StepCoordinator, count: int) -> None:
        self.pool, self.coordinator, self.count = pool, coordinator, count
        self.executor = SharedExecutor(self)
        self.asked: int | None = None
        """The signal by which the group was asked to stop."""
        self._begun: set[int] = set()
        self._checkpoints: dict[int, Checkpoints] = {}

    def use(self, adapter: Adapter) -> None:
        """Have ``adapter`` load its backbone from the weights that are in memory once, and compute with the others."""
        adapter.source = adapter.source.loaded_by(partial(self._load, adapter.source))
        adapter.executor = self.executor

    def _load(self, source: Pretrained) -> Backbone:
        # In float32 whatever is asked for: images are drawn with the same weights; settle() halves for training.
        loaded = self.pool.copied(source)
        loaded.pair_executor = self.executor
        # Caches are filled and images of the class drawn without a call, for minutes where there are many.
        leave = self._leaves()
        for part in (loaded.unet, loaded.vae.encoder):
            part.register_forward_pre_hook(leave)
        return loaded

    def _leaves(self) -> Callable[..., None]:
        # What is loaded behind the training is there to be measured.
        measuring = self.coordinator.here in self._begun
        return lambda *_: self.leave_if_asked(measuring)

    def peak_memory(self) -> int | None:
        """Bytes: the peak of the steps that all take together."""
        return self.pool.peak

    def trainer_arguments(self) -> dict[str, Any]:
        """The trainer's arguments that differ from the config's: a run has one device, and moves nothing of it."""
        return {"devices": 1, "num_nodes": 1, "strategy": OneDevice(self.pool)}

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


class SharedExecutor:
    """Hands a run's forward and backward passes to the step coordinator, which answers those of all runs in batches.

    A :class:`~sdtune.training.executor.ModelExecutor` for the training, and a
    :class:`~sdtune.backbone.backbone.PairExecutor` for what is drawn from a finished run.
    """

    def __init__(self, shared: SharedBackbone) -> None:
        self._shared = shared
        self._default = torch.get_default_dtype()

    def predict(self, unet: UNet2DConditionModel, inputs: dict[str, Any]) -> Tensor:
        return self._forward(unet, inputs, None)

    def predict_with_pairs(self, unet: UNet2DConditionModel, inputs: dict[str, Any], pairs: Pairs) -> Tensor:
        device = self._shared.pool.device
        own = {n: Pair(down.to(device), up.to(device), scale, 0.0) for n, (down, up, scale) in pairs.items()}
        return self._forward(unet, inputs, own)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._ask(Back(loss, kwargs))

    def _forward(self, unet: UNet2DConditionModel, inputs: dict[str, Any], pairs: Mapping[str, Pair] | None) -> Tensor:
        sample: Tensor = inputs["sample"]
        kind = sample.device.type
        mode = Mode(
            torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
            unet.training,
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            torch.get_default_dtype(),
        )
        inputs = {**inputs, "timestep": inputs["timestep"].expand(len(sample))}
        # The step has seeded the global generator by its place; a neighbour's turn would seed it anew.
        answer: Tensor = self._ask(Forward(unet, inputs, mode, pairs, torch.initial_seed()))
        return answer

    def _ask(self, call: PendingCall) -> Any:
        self._shared.leave_if_asked(isinstance(call, Forward) and call.pairs is not None)
        # Lightning's 64-true and 16-true change torch's default type for a step: put aside while others compute.
        with default_dtype(self._default):
            return self._shared.coordinator.ask(call)


class OneDevice(SingleDeviceStrategy):
    """Leaves the weights that are shared where they are, when a run begins and when it ends."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool.device)
        self._pool, self._ending = pool, False

    def model_to_device(self) -> None:
        assert isinstance(self.model, Adapter)
        self._pool.settle(self.model)

    @property
    def lightning_module(self) -> pl.LightningModule | None:
        """None while the strategy is torn down: Lightning would move the module to the CPU."""
        return None if self._ending else super().lightning_module

    def teardown(self) -> None:
        self._ending = True
        try:
            super().teardown()
        finally:
            self._ending = False


class Together(Callback):
    """From the first step on, a run moves with the others."""

    priority: ClassVar[int] = -60

    def __init__(self, shared: SharedBackbone) -> None:
        self._shared = shared

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shared.coordinator.ask(JoinCall())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._shared.begin()
