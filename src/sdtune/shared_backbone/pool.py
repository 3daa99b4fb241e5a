"""One backbone in memory for several runs; answers their forward and backward calls in batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from traceback import format_exception
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.backbone.quantization import quantize
from sdtune.data.batch_sizes import class_image_batch_size
from sdtune.errors import RunFailed, UserError
from sdtune.hardware.allocator import release
from sdtune.hardware.memory import peak_memory, reset_peak_memory
from sdtune.hardware.out_of_memory import ADVICE, is_out_of_memory
from sdtune.hardware.precision import HALVES
from sdtune.methods.base import Adapter
from sdtune.shared_backbone.batched_denoiser import BatchedDenoiser, Mode, map_tensors, shape
from sdtune.shared_backbone.padding import LoRAPair
from sdtune.shared_backbone.step_coordinator import PendingCall

M = TypeVar("M", bound=nn.Module)


@dataclass
class Forward(PendingCall):
    """Denoiser call of one run; the first dimension of each tensor in ``inputs`` is the run's samples.

    ``pairs`` are the pairs of a finished run, applied to the weights as loaded; None: the pairs that ``denoiser``
    trains. ``seed`` is the seed of the run's dropout.
    """

    denoiser: Any
    inputs: dict[str, Any]
    mode: Mode
    pairs: Mapping[str, LoRAPair] | None = None
    seed: int = 0

    @property
    def joint(self) -> bool:
        return self.mode.gradients


@dataclass
class Back(PendingCall):
    """Backward call of one run for its loss; ``more`` are further arguments of ``torch.autograd.backward``."""

    loss: Tensor
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def joint(self) -> bool:
        return True


class Pool:
    """Weights that several runs share, and the batched denoisers that compute for all of them.

    Args:
        device: training device.
        precision: Lightning's ``precision``.
        size: number of concurrent runs.
        rank: largest LoRA rank of any run.
        drops: whether any run has dropout.
    """

    peak: int | None = None
    """Peak memory of a joint step in bytes, measured as in :class:`sdtune.callbacks.cost.CostMeter`."""

    def __init__(self, device: torch.device, precision: str, size: int, rank: int, drops: bool) -> None:
        self.device, self.precision, self.size, self.rank, self.drops = device, precision, size, rank, drops
        self.threads = torch.get_num_threads()
        self._base: Backbone | None = None
        self._moved: dict[int, Tensor] = {}
        self._stepped = False
        self._training_denoiser: BatchedDenoiser | None = None
        self._denoiser_as_loaded: BatchedDenoiser | None = None
        self._layers: WeakKeyDictionary[Any, dict[str, LoraLayer]] = WeakKeyDictionary()

    # --- weights

    def copied(self, source: Pretrained) -> Backbone:
        """Return a backbone with its own parameters on the shared storage; the first call loads the weights."""
        if self._base is None:
            half_dtype = HALVES.get(self.precision) if self.device.type != "cpu" else None
            self._base = source.load(denoiser_dtype=half_dtype)
            if half_dtype is not None:  # one copy of the weights serves the training and the images of finished runs
                self._base.cast_frozen(self.precision)
            quantize(self._base, source.quantize)
            self._base.prepare_for_device(self.device)
            if self.precision == "64-true":
                self._base.double()  # as Lightning does with the module that it trains
        base = self._base
        # Check the last parameter, because an earlier move may have been interrupted.
        if self._moved and list(base.parameters())[-1].device != self.device:
            # Backbones that are loaded from now on generate images; each would copy the weights to the device.
            for parameter in base.parameters():
                address = parameter.data_ptr()
                moved = self._moved.get(address, parameter.data)
                parameter.data = moved if moved.dtype == parameter.dtype else parameter.data.to(self.device)
                self._moved.pop(address, None)
                self._moved[parameter.data_ptr()] = moved
        return _copy_on_storage(base, lambda parameter: parameter.data)

    def settle(self, adapter: Adapter) -> None:
        """Move ``adapter`` to the device; the shared frozen weights have one storage and dtype for all runs."""
        assert self._base is not None
        shared = {p.data_ptr() for p in self._base.parameters()}
        half_dtype = HALVES.get(self.precision)
        check_plain_pairs(adapter)
        for name, parameter in adapter.named_parameters():
            address = parameter.data_ptr()
            if parameter.requires_grad or address not in shared:
                parameter.data = parameter.data.to(self.device)
            else:
                if address not in self._moved:
                    keeps_dtype = name.startswith("backbone.vae.") or not parameter.is_floating_point()
                    dtype = None if keeps_dtype else half_dtype
                    self._moved[address] = parameter.data.to(self.device, dtype or parameter.dtype)
                parameter.data = self._moved[address]
        for buffer in adapter.buffers():
            buffer.data = buffer.data.to(self.device)
        adapter.to(self.device)  # moves no tensor; sets the device that the LightningModule reports

    # --- batched calls

    def use_threads(self, all_of_them: bool) -> None:
        """On a CPU, set the number of torch threads of the current thread to all or to 1.

        OpenMP keeps a team of threads for each thread that ever used one. With more team members than cores, idle
        members sleep instead of spinning, which made a step of eight runs a third slower.
        """
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads if all_of_them else 1)

    def answer(self, calls: dict[int, PendingCall]) -> Collection[int]:
        """Answer ``calls`` by run number in as few batches as their shapes allow; return the answered numbers.

        Losses are answered first: a run that started later is half a step behind, and waits so that all runs do their
        forward passes together. Calls without gradients (images, validation losses) are answered between steps, when no
        activations are stored for backward. An error there fails only the runs of that batch; an error in a step fails
        all runs of the step.
        """
        self.use_threads(True)
        losses = {number: call for number, call in calls.items() if isinstance(call, Back)}
        steps, others = (
            {n: call for n, call in calls.items() if isinstance(call, Forward) and call.mode.gradients is grad}
            for grad in (True, False)
        )
        try:
            if losses:
                self._backward(losses)
            elif steps:
                self._step(steps)
                return steps.keys()
        except Exception as error:
            failure = self._failure(error)
            # The other calls wait until the failed runs have released their memory.
            for call in (*losses.values(), *steps.values()):
                call.answer, call.error = None, failure
            return losses.keys() | steps.keys()
        self._infer(others)
        return losses.keys() | others.keys()

    def _failure(self, error: Exception) -> RunFailed:
        """Exception for the runs of a failed batch; traceback as text, since its frames would keep a step's memory."""
        details = "".join(format_exception(error))
        if not is_out_of_memory(error):
            return RunFailed(f"{type(error).__name__}: {error}", details=details)
        advice = ADVICE["shared by one" if self.size == 1 else "shared"]
        return RunFailed(advice.format(runs=self.size, fewer=self.size // 2), details=details)

    def _backward(self, losses: Mapping[int, Back]) -> None:
        calls = list(losses.values())
        torch.autograd.backward([call.loss for call in calls], **calls[0].more)
        self.peak = max(peak_memory(self.device) or 0, self.peak or 0) or None

    def _step(self, steps: Mapping[int, Forward]) -> None:
        if not self._stepped:
            self._stepped = True
            release()  # frees memory left over from loading and from the first previews
        reset_peak_memory(self.device)
        for calls in _batches(steps):
            self.compute(calls, set(range(self.size)) - steps.keys())

    def _infer(self, others: Mapping[int, Forward]) -> None:
        for calls in _batches(others):
            for part in self.in_parts(calls):
                try:
                    self.compute(part, set())
                except Exception as error:
                    failure = self._failure(error)
                    for call in part.values():
                        call.error = failure

    def in_parts(self, calls: dict[int, Forward]) -> Iterator[dict[int, Forward]]:
        """Split ``calls`` without gradients into passes of at most as many samples as one batch of images has."""
        assert self._base is not None
        count, _, height, width = next(iter(next(iter(calls.values())).inputs.values())).shape
        side = int(math.sqrt(height * width)) * self._base.facts.factor
        per_pass = max(1, 2 * class_image_batch_size(side) // count)
        remaining = list(calls.items())
        for first in range(0, len(remaining), per_pass):
            yield dict(remaining[first : first + per_pass])

    def compute(self, calls: dict[int, Forward], idle: set[int]) -> None:
        """Answer ``calls``, which have equal shapes, with one forward pass of the denoiser.

        Args:
            idle: numbers of runs that do not train now, because they have ended or generate images. In a training
                step, zeros replace their samples, so that the results of the training runs do not change.
        """
        first = next(iter(calls.values()))
        numbers = sorted({*calls, *idle}) if first.mode.gradients else sorted(calls)
        zeros = map_tensors(torch.zeros_like, first.inputs) if len(numbers) > len(calls) else {}
        predictions = self._joint(first)(
            [self._pairs(calls[number]) if number in calls else {} for number in numbers],
            [calls[number].inputs if number in calls else zeros for number in numbers],
            first.mode,
            [calls[number].seed if number in calls else 0 for number in numbers],
        )
        for prediction, number in zip(predictions, numbers, strict=True):
            if number in calls:
                calls[number].answer = prediction

    def _joint(self, call: Forward) -> BatchedDenoiser:
        """Batched denoiser for ``call``: for training, or for the pairs of finished runs on the weights as loaded."""
        assert self._base is not None
        denoiser = self._base.denoiser
        if call.pairs is not None:
            if self._denoiser_as_loaded is None:
                self._denoiser_as_loaded = BatchedDenoiser(
                    _copy_on_storage(denoiser, lambda parameter: parameter.data), False, self.rank, False
                )
            return self._denoiser_as_loaded
        if self._training_denoiser is None:
            moved = _copy_on_storage(denoiser, lambda parameter: self._moved[parameter.data_ptr()])
            self._training_denoiser = BatchedDenoiser(
                moved, call.denoiser.is_gradient_checkpointing, self.rank, self.drops
            )
        return self._training_denoiser

    def _pairs(self, call: Forward) -> Mapping[str, LoRAPair]:
        """Current LoRA pairs of a run by layer name."""
        if call.pairs is not None:
            return call.pairs
        if call.denoiser not in self._layers:
            modules = call.denoiser.named_modules()
            self._layers[call.denoiser] = {
                n: m for n, m in modules if isinstance(m, LoraLayer) and "default" in m.lora_A
            }
        return {name: _pair(layer) for name, layer in self._layers[call.denoiser].items()}


def _batches(calls: Mapping[int, Forward]) -> Collection[dict[int, Forward]]:
    """Group the calls that can be computed as one batch."""
    batches: dict[Any, dict[int, Forward]] = {}
    for number, call in calls.items():
        batches.setdefault((call.pairs is None, call.mode, shape(call.inputs)), {})[number] = call
    return batches.values()


def _copy_on_storage(model: M, storage: Callable[[Tensor], Tensor]) -> M:
    """Copy of ``model`` with its own frozen parameters on ``storage(parameter)``; buffers are shared."""
    memo: dict[int, Any] = {id(p): nn.Parameter(storage(p), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)


def _pair(layer: LoraLayer) -> LoRAPair:
    dropout = layer.lora_dropout["default"]
    return LoRAPair(
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        float(layer.scaling["default"]),
        dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
    )


def check_plain_pairs(adapter: Adapter) -> None:
    """Raise UserError if a LoRA layer of ``adapter`` is more than W + scale B A, which the joint step would ignore."""
    for name, layer in adapter.named_modules():
        if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A:
            continue
        lora: Any = layer
        has_one_pair = isinstance(lora.get_base_layer(), nn.Linear | nn.Conv2d) and set(lora.lora_A) == {"default"}
        if not has_one_pair or lora.lora_variant or lora.lora_bias["default"]:
            raise UserError(
                f"layer {name} is not a plain LoRA pair; a shared backbone supports only plain pairs",
                key="hydra/launcher",
                remedy="set hydra/launcher=basic",
            )
