"""One backbone in memory for several runs; it answers their forward and backward calls in batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from traceback import format_exception
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.errors import RunFailed, UserError
from sdtune.hardware.allocator import release
from sdtune.hardware.memory import peak_memory, reset_peak_memory
from sdtune.hardware.out_of_memory import ADVICE, is_out_of_memory
from sdtune.hardware.precision import HALVES
from sdtune.methods.base import Adapter
from sdtune.shared_backbone.batched_unet import Joint, Mode, mapped, shape
from sdtune.shared_backbone.padding import Pair
from sdtune.shared_backbone.step_coordinator import PendingCall
from sdtune.training.caching import drawn_at_once

M = TypeVar("M", bound=nn.Module)


@dataclass
class Forward(PendingCall):
    """One run's call of its UNet: ``inputs`` all have its samples in their first dimension.

    ``pairs`` are what a finished run left, on the weights as they were loaded; None for those that the UNet trains.
    ``seed`` is of its dropout.
    """

    unet: UNet2DConditionModel
    inputs: dict[str, Any]
    mode: Mode
    pairs: Mapping[str, Pair] | None = None
    seed: int = 0

    @property
    def joint(self) -> bool:
        return self.mode.gradients


@dataclass
class Back(PendingCall):
    """One run's loss, whose gradients it waits for."""

    loss: Tensor
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def joint(self) -> bool:
        return True


class Pool:
    """The weights that runs share, and the UNets that work for all of them.

    Args:
        device: where they train.
        precision: Lightning's.
        size: how many runs at once.
        rank: the largest that any run has.
        drops: whether any run has dropout.
    """

    peak: int | None = None
    """Peak memory of a joint step in bytes, as :class:`sdtune.callbacks.cost.CostMeter` counts it."""

    def __init__(self, device: torch.device, precision: str, size: int, rank: int, drops: bool) -> None:
        self.device, self.precision, self.size, self.rank, self.drops = device, precision, size, rank, drops
        self.threads = torch.get_num_threads()
        self._base: Backbone | None = None
        self._moved: dict[int, Tensor] = {}
        self._stepped = False
        self._trained: Joint | None = None
        self._whole: Joint | None = None
        self._layers: WeakKeyDictionary[UNet2DConditionModel, dict[str, LoraLayer]] = WeakKeyDictionary()

    # --- weights

    def copied(self, source: Pretrained) -> Backbone:
        """A backbone on the weights that all share, which are loaded once; parameters are its own, storage is not."""
        if self._base is None:
            self._base = source.load()
            self._base.prepare_for_device(self.device)
            if self.precision == "64-true":
                self._base.double()  # as Lightning does with a model that it is given
        base = self._base
        # The last one: moving them may have been cut short.
        if self._moved and list(base.parameters())[-1].device != self.device:
            # What is loaded from now on draws images, and would bring a copy of its own to the device.
            for parameter in base.parameters():
                place = parameter.data_ptr()
                moved = self._moved.get(place, parameter.data)
                parameter.data = moved if moved.dtype == parameter.dtype else parameter.data.to(self.device)
                self._moved.pop(place, None)
                self._moved[parameter.data_ptr()] = moved
        return _over(base, lambda parameter: parameter.data)

    def settle(self, adapter: Adapter) -> None:
        """Put ``adapter`` on the device: what is shared and frozen in one place and type for all runs."""
        assert self._base is not None
        shared = {p.data_ptr() for p in self._base.parameters()}
        half = HALVES.get(self.precision)
        check_plain_pairs(adapter)
        for name, parameter in adapter.named_parameters():
            place = parameter.data_ptr()
            if parameter.requires_grad or place not in shared:
                parameter.data = parameter.data.to(self.device)
            else:
                if place not in self._moved:
                    wanted = None if name.startswith("backbone.vae.") else half
                    self._moved[place] = parameter.data.to(self.device, wanted or parameter.dtype)
                parameter.data = self._moved[place]
        for buffer in adapter.buffers():
            buffer.data = buffer.data.to(self.device)
        adapter.to(self.device)  # moves nothing any more; Lightning learns from it where its module is

    # --- one UNet for all

    def use_threads(self, all_of_them: bool) -> None:
        """On a CPU, have the thread at hand compute with all of torch's threads, or with itself alone.

        OpenMP keeps a team for each thread that ever had one, and where there are more members than cores none waits
        for the next piece of work awake: a step of eight runs took a third longer.
        """
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads if all_of_them else 1)

    def answer(self, calls: dict[int, PendingCall]) -> Collection[int]:
        """Answer ``calls``, by number of the run, in as few batches as their shapes allow; the numbers answered.

        Losses come first: a run that has come later is a half step off, and waits so that all go forward together.
        Images are drawn and losses validated between steps, while no activations are kept for backward; where that
        fails, it is an error of those alone who asked for it; where a step does, of all who are in one.
        """
        self.use_threads(True)
        losses = {number: call for number, call in calls.items() if isinstance(call, Back)}
        steps, others = (
            {number: q for number, q in calls.items() if isinstance(q, Forward) and q.mode.gradients is wanted}
            for wanted in (True, False)
        )
        try:
            if losses:
                self._backward(losses)
            elif steps:
                self._step(steps)
                return steps.keys()
        except Exception as error:
            failure = self._failure(error)
            # The others wait until the memory is free that these hold.
            for call in (*losses.values(), *steps.values()):
                call.answer, call.error = None, failure
            return losses.keys() | steps.keys()
        self._draw(others)
        return losses.keys() | others.keys()

    def _failure(self, error: Exception) -> RunFailed:
        """What ends the runs that asked; the traceback as text, since its frames hold the memory of a step."""
        details = "".join(format_exception(error))
        if not is_out_of_memory(error):
            return RunFailed(f"{type(error).__name__}: {error}", details=details)
        way = ADVICE["shared by one" if self.size == 1 else "shared"]
        return RunFailed(way.format(runs=self.size, fewer=self.size // 2), details=details)

    def _backward(self, losses: Mapping[int, Back]) -> None:
        each = list(losses.values())
        torch.autograd.backward([one.loss for one in each], **each[0].more)
        self.peak = max(peak_memory(self.device) or 0, self.peak or 0) or None

    def _step(self, steps: Mapping[int, Forward]) -> None:
        if not self._stepped:
            self._stepped = True
            release()  # of what loading has left, and the first previews
        reset_peak_memory(self.device)
        for calls in _alike(steps):
            self.compute(calls, set(range(self.size)) - steps.keys())

    def _draw(self, others: Mapping[int, Forward]) -> None:
        for calls in _alike(others):
            for part in self.in_parts(calls):
                try:
                    self.compute(part, set())
                except Exception as error:
                    failure = self._failure(error)
                    for call in part.values():
                        call.error = failure

    def in_parts(self, calls: dict[int, Forward]) -> Iterator[dict[int, Forward]]:
        """``calls`` without gradients, so many in a pass that their samples are those of images drawn at once."""
        assert self._base is not None
        count, _, height, width = next(iter(calls.values())).inputs["sample"].shape
        side = int(math.sqrt(height * width)) * self._base.facts.factor
        each = max(1, 2 * drawn_at_once(side) // count)
        left = list(calls.items())
        for first in range(0, len(left), each):
            yield dict(left[first : first + each])

    def compute(self, calls: dict[int, Forward], idle: set[int]) -> None:
        """Answer ``calls``, which have one shape, by one forward pass of the UNet.

        Args:
            idle: numbers of runs that do not train at present: they have ended, or draw. Zeros stand for their samples
                in a training step, so that the sums of those who train stay as they are.
        """
        first = next(iter(calls.values()))
        numbers = sorted({*calls, *idle}) if first.mode.gradients else sorted(calls)
        blank = mapped(torch.zeros_like, first.inputs) if len(numbers) > len(calls) else {}
        said = self._joint(first)(
            [self._pairs(calls[number]) if number in calls else {} for number in numbers],
            [calls[number].inputs if number in calls else blank for number in numbers],
            first.mode,
            [calls[number].seed if number in calls else 0 for number in numbers],
        )
        for part, number in zip(said, numbers, strict=True):
            if number in calls:
                calls[number].answer = part

    def _joint(self, call: Forward) -> Joint:
        """The UNet for calls like ``call``."""
        assert self._base is not None
        own = self._base.unet
        if call.pairs is not None:
            if self._whole is None:
                self._whole = Joint(_over(own, lambda parameter: parameter.data), False, self.rank, False)
            return self._whole
        if self._trained is None:
            moved = _over(own, lambda parameter: self._moved[parameter.data_ptr()])
            self._trained = Joint(moved, call.unet.is_gradient_checkpointing, self.rank, self.drops)
        return self._trained

    def _pairs(self, call: Forward) -> Mapping[str, Pair]:
        """The pairs of a run as they are now, by the site's name."""
        if call.pairs is not None:
            return call.pairs
        if call.unet not in self._layers:
            named = call.unet.named_modules()
            self._layers[call.unet] = {n: m for n, m in named if isinstance(m, LoraLayer) and "default" in m.lora_A}
        return {name: _pair(layer) for name, layer in self._layers[call.unet].items()}


def _alike(calls: Mapping[int, Forward]) -> Collection[dict[int, Forward]]:
    """Those that are one batch."""
    found: dict[Any, dict[int, Forward]] = {}
    for number, call in calls.items():
        found.setdefault((call.pairs is None, call.mode, shape(call.inputs)), {})[number] = call
    return found.values()


def _over(model: M, storage: Callable[[Tensor], Tensor]) -> M:
    """A copy of ``model`` whose parameters are its own and frozen, on the ``storage`` of each; buffers are shared."""
    memo: dict[int, Any] = {id(p): nn.Parameter(storage(p), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)


def _pair(layer: LoraLayer) -> Pair:
    dropout = layer.lora_dropout["default"]
    return Pair(
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        float(layer.scaling["default"]),
        dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
    )


def check_plain_pairs(adapter: Adapter) -> None:
    """UserError for a LoRA layer of ``adapter`` that is more than W + scale B A: the joint step would ignore that."""
    for name, layer in adapter.named_modules():
        if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A:
            continue
        own: Any = layer
        plain = isinstance(own.get_base_layer(), nn.Linear | nn.Conv2d) and set(own.lora_A) == {"default"}
        if not plain or own.lora_variant or own.lora_bias["default"]:
            raise UserError(
                f"{name} is not a plain low-rank pair, which alone can be trained on a backbone with others",
                key="hydra/launcher",
                remedy="give hydra/launcher=basic",
            )
