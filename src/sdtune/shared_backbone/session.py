"""Connects a training run to a shared backbone: model loading, model calls, strategy and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone, Pairs
from sdtune.callbacks.checkpoints import Checkpoints
from sdtune.callbacks.progress_bar import ProgressBar
from sdtune.hardware.precision import default_dtype
from sdtune.methods.base import Adapter
from sdtune.shared_backbone.batched_denoiser import Mode
from sdtune.shared_backbone.padding import LoRAPair
from sdtune.shared_backbone.pool import Back, Forward, Pool
from sdtune.shared_backbone.step_coordinator import JoinCall, PendingCall, StepCoordinator


class SharedBackbone:
    """Shared backbone of a group of runs, as each run uses it.

    Args:
        pool: the weights and batched denoisers.
        coordinator: coordinator of the runs' threads.
        count: number of concurrent runs; cost metrics are for these runs together.
    """

    def __init__(self, pool: Pool, coordinator: StepCoordinator, count: int) -> None:
        self.pool, self.coordinator, self.count = pool, coordinator, count
        self.executor = SharedExecutor(self)
        self.stop_signal: int | None = None
        """The stop signal that the group has received; None before."""
        self._training: set[int] = set()
        self._checkpoints: dict[int, Checkpoints] = {}

    def use(self, adapter: Adapter) -> None:
        """Have ``adapter`` load its backbone from the shared weights and run its model calls in shared batches."""
        adapter.source = adapter.source.with_loader(partial(self._load, adapter.source))
        adapter.executor = self.executor

    def _load(self, source: Pretrained) -> Backbone:
        # float32 on a CPU, where settle() casts a copy for training; on a GPU also images need only half precision.
        loaded = self.pool.copied(source)
        loaded.pair_executor = self.executor
        # Filling caches and generating class images may take minutes without a call; hooks check for a stop there.
        hook = self._stop_hook()
        for part in (loaded.denoiser, loaded.vae.encoder):
            part.register_forward_pre_hook(hook)
        return loaded

    def _stop_hook(self) -> Callable[..., None]:
        # A backbone that is loaded after the training has begun is for evaluation.
        measuring = self.coordinator.current_number in self._training
        return lambda *_: self.end_if_stopped(measuring)

    def peak_memory(self) -> int | None:
        """Peak memory of the joint steps in bytes; None if it is not measured."""
        return self.pool.peak

    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments that replace the config's: one device, and a strategy that does not move shared weights."""
        return {"devices": 1, "num_nodes": 1, "strategy": SharedWeightsStrategy(self.pool)}

    def callbacks(self, own: list[Callback], checkpoints: Checkpoints) -> list[Callback]:
        """Callbacks of a run on the shared backbone; ``own`` are the run's callbacks, including ``checkpoints``."""
        number = self.coordinator.current_number
        assert number is not None
        self._checkpoints[number] = checkpoints
        # One progress bar is enough, because the runs take their steps together.
        return [
            JoinOthers(self),
            *(callback for callback in own if number == 0 or not isinstance(callback, ProgressBar)),
        ]

    def stop(self, number: int) -> None:
        """Have every run finish its step, save and stop."""
        self.stop_signal = number
        for checkpoints in list(self._checkpoints.values()):
            checkpoints.request_stop(number)

    def mark_training(self) -> None:
        """Mark the current run as training, so that a stop lets it save; called at the start of each step."""
        self.end_if_stopped()
        number = self.coordinator.current_number
        assert number is not None
        self._training.add(number)

    def end_if_stopped(self, measuring: bool = False) -> None:
        """End the current run after a stop signal if it has nothing to save.

        That is so before its first step, and when it evaluates its artifact (``measuring``).
        """
        if self.stop_signal is not None and (measuring or self.coordinator.current_number not in self._training):
            raise SystemExit(128 + self.stop_signal)

    def remove(self, number: int) -> None:
        """Remove the run ``number``, which has ended."""
        self._checkpoints.pop(number, None)
        self._training.discard(number)


class SharedExecutor:
    """Passes a run's forward and backward calls to the step coordinator, which answers those of all runs in batches.

    A :class:`~sdtune.training.executor.ModelExecutor` for training, and a
    :class:`~sdtune.backbone.backbone.PairExecutor` for images of a finished run.
    """

    def __init__(self, shared: SharedBackbone) -> None:
        self._shared = shared
        self._default = torch.get_default_dtype()

    def predict(self, denoiser: Any, inputs: dict[str, Any]) -> Tensor:
        return self._forward(denoiser, inputs, None)

    def predict_with_pairs(self, denoiser: Any, inputs: dict[str, Any], pairs: Pairs) -> Tensor:
        device = self._shared.pool.device
        device_pairs = {
            n: LoRAPair(down.to(device), up.to(device), scale, 0.0) for n, (down, up, scale) in pairs.items()
        }
        return self._forward(denoiser, inputs, device_pairs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._request(Back(loss, kwargs))

    def _forward(self, denoiser: Any, inputs: dict[str, Any], pairs: Mapping[str, LoRAPair] | None) -> Tensor:
        sample: Tensor = next(iter(inputs.values()))  # the noisy latents
        kind = sample.device.type
        mode = Mode(
            torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
            denoiser.training,
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            torch.get_default_dtype(),
        )
        inputs = {**inputs, "timestep": inputs["timestep"].expand(len(sample))}
        # Read the seed of this step now: other runs seed the global generator before the batch is computed.
        answer: Tensor = self._request(Forward(denoiser, inputs, mode, pairs, torch.initial_seed()))
        return answer

    def _request(self, call: PendingCall) -> Any:
        self._shared.end_if_stopped(isinstance(call, Forward) and call.pairs is not None)
        # Lightning's 64-true and 16-true set torch's default dtype during a step; reset it while other runs compute.
        with default_dtype(self._default):
            return self._shared.coordinator.request(call)


class SharedWeightsStrategy(SingleDeviceStrategy):
    """Single-device strategy that does not move the shared weights when a run starts or ends."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool.device)
        self._pool, self._ending = pool, False

    def model_to_device(self) -> None:
        assert isinstance(self.model, Adapter)
        self._pool.settle(self.model)

    @property
    def lightning_module(self) -> pl.LightningModule | None:
        """None during teardown, because Lightning would move the module to the CPU."""
        return None if self._ending else super().lightning_module

    def teardown(self) -> None:
        self._ending = True
        try:
            super().teardown()
        finally:
            self._ending = False


class JoinOthers(Callback):
    """Callback that adds a run to the joint steps: before its first step, or before a validation if no step is left."""

    priority: ClassVar[int] = -60

    def __init__(self, shared: SharedBackbone) -> None:
        self._shared = shared

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shared.coordinator.request(JoinCall())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._shared.coordinator.request(JoinCall())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._shared.mark_training()
