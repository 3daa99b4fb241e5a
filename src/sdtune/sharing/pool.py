"""A backbone that is in memory once for several runs, and goes forward and back for all of them at once."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import HALVES, Backbone
from sdtune.methods.activations import checkpoint_activations
from sdtune.methods.base import Adapter
from sdtune.sharing.padded import Padding, Pair, Stack
from sdtune.sharing.stack import Present, Stacked
from sdtune.sharing.turns import Question


@dataclass(frozen=True)
class Mode:
    """What of the state around a call decides how it is computed."""

    gradients: bool
    training: bool
    autocast: tuple[bool, torch.dtype]
    default: torch.dtype

    @contextmanager
    def entered(self, kind: str) -> Iterator[None]:
        """The same state in the thread at hand, on devices of ``kind``."""
        enabled, dtype = self.autocast
        with (
            default_dtype(self.default),
            torch.set_grad_enabled(self.gradients),
            torch.autocast(kind, dtype, enabled=enabled),
        ):
            yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default type, which all threads have in common."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Forward(Question):
    """One run's call of its UNet: ``inputs`` all have its samples in their first dimension."""

    unet: UNet2DConditionModel
    inputs: dict[str, Any]
    mode: Mode


@dataclass
class Back(Question):
    """One run's loss, whose gradients it waits for."""

    loss: Tensor
    more: dict[str, Any] = field(default_factory=dict)


class Shared(Pretrained):
    """``source`` for several runs: each load is a model of its own on the same weights."""

    def __init__(self, source: Pretrained, pool: Pool) -> None:
        self.__dict__.update(source.__dict__)
        self._source, self._pool = source, pool

    def load(self, seed: int = 0) -> Backbone:
        return self._pool.copied(self._source)


class Pool:
    """The weights that runs share, and the UNet that works for all of them.

    Args:
        device: where they train.
        precision: Lightning's.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.precision = device, precision
        self._base: Backbone | None = None
        self._moved: dict[int, Tensor] = {}
        self._unet: UNet2DConditionModel | None = None
        self._sites: set[str] = set()
        self._present, self._padding = Present(), Padding()
        self._layers: WeakKeyDictionary[UNet2DConditionModel, dict[str, LoraLayer]] = WeakKeyDictionary()
        self._vacant: set[int] = set()

    # --- weights

    def copied(self, source: Pretrained) -> Backbone:
        """A backbone on the weights that all share, which are loaded once; parameters are its own, storage is not."""
        if self._base is None:
            self._base = source.load()
            self._base.suit(self.device)
            if self.precision == "64-true":
                self._base.double()  # as Lightning does with a model that it is given
        base = self._base
        memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.parameters()}
        memo |= {id(b): b for b in base.buffers()}
        return copy.deepcopy(base, memo)

    def settle(self, adapter: Adapter) -> None:
        """Put ``adapter`` on the device: what is shared and frozen in one place and type for all runs."""
        assert self._base is not None
        shared = {p.data_ptr() for p in self._base.parameters()}
        half = HALVES.get(self.precision)
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

    # --- one UNet for all

    def answer(self, questions: dict[int, Question]) -> Collection[int]:
        """Answer what the runs at these seats ask, in as few passes as their shapes allow; the seats answered.

        Losses come first: a run that has come later is a half step off, and waits so that all go forward together.
        """
        losses = {seat: question for seat, question in questions.items() if isinstance(question, Back)}
        if losses:
            each = list(losses.values())
            torch.autograd.backward([one.loss for one in each], **each[0].more)
            return losses.keys()
        alike: dict[Any, dict[int, Forward]] = {}
        for seat, question in questions.items():
            assert isinstance(question, Forward)
            alike.setdefault((question.mode, _shape(question.inputs)), {})[seat] = question
        for calls in alike.values():
            self._forward(calls)
        return questions.keys()

    def leave(self, seat: int) -> None:
        """The run at ``seat`` has ended: zeros stand for its samples, so that the others' sums stay as they are."""
        self._vacant.add(seat)

    def enter(self, seat: int) -> None:
        """A run has taken ``seat``."""
        self._vacant.discard(seat)

    def _forward(self, calls: dict[int, Forward]) -> None:
        first = next(iter(calls.values()))
        unet = self._built(first.unet)
        if unet.training != first.mode.training:
            unet.train(first.mode.training)
        empty = self._vacant - set(calls) if first.mode.gradients else set()
        seats = sorted({*calls, *empty})
        pairs = {seat: self._pairs(calls[seat].unet) if seat in calls else {} for seat in seats}
        for name in {name for own in pairs.values() for name in own} - self._sites:
            self._open(unet, name)
        present = {name: [pairs[seat].get(name) for seat in seats] for name in self._sites}
        blank = _mapped(torch.zeros_like, first.inputs) if empty else {}
        inputs = _joined([calls[seat].inputs if seat in calls else blank for seat in seats])
        with first.mode.entered(self.device.type):
            self._present.stacks = self._padding.stacks(present, self._products())
            out = unet(**inputs).sample
        for part, seat in zip(out.chunk(len(seats)), seats, strict=True):
            if seat in calls:
                calls[seat].answer = UNet2DConditionOutput(sample=part)

    def _products(self) -> torch.dtype:
        """The type in which pairs are multiplied."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return torch.float64 if self.precision == "64-true" else torch.float32

    def _built(self, like: UNet2DConditionModel) -> UNet2DConditionModel:
        """The UNet that works for all, without pairs to begin with; ``like`` a run's own is."""
        if self._unet is None:
            assert self._base is not None
            memo: dict[int, Any] = {
                id(p): nn.Parameter(self._moved[p.data_ptr()], requires_grad=False)
                for p in self._base.unet.parameters()
            }
            self._unet = copy.deepcopy(self._base.unet, memo)
            if like.is_gradient_checkpointing:
                # Blocks are computed again within backward, when others may be in the batch.
                checkpoint_activations(
                    self._unet, context_fn=lambda: (nullcontext(), self._again(self._present.stacks))
                )
        return self._unet

    def _open(self, unet: UNet2DConditionModel, name: str) -> None:
        parent, _, own = name.rpartition(".")
        holder = unet.get_submodule(parent)
        layer = getattr(holder, own)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        setattr(holder, own, Stacked(layer, name, self._present))
        self._sites.add(name)

    @contextmanager
    def _again(self, stacks: Mapping[str, Stack]) -> Iterator[None]:
        now, self._present.stacks = self._present.stacks, stacks
        try:
            yield
        finally:
            self._present.stacks = now

    def _pairs(self, unet: UNet2DConditionModel) -> dict[str, Pair]:
        """The pairs in a run's own UNet as they are now, by the site's name."""
        if unet not in self._layers:
            named = unet.named_modules()
            self._layers[unet] = {n: m for n, m in named if isinstance(m, LoraLayer) and "default" in m.lora_A}
        return {name: _pair(layer) for name, layer in self._layers[unet].items()}


def _pair(layer: LoraLayer) -> Pair:
    dropout = layer.lora_dropout["default"]
    return Pair(
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        float(layer.scaling["default"]),
        dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
    )


def _shape(inputs: Any) -> Any:
    """What two calls must have in common to be one: the tensors' shapes and types, by place."""
    if isinstance(inputs, Tensor):
        return (tuple(inputs.shape), inputs.dtype)
    if isinstance(inputs, dict):
        return tuple((key, _shape(value)) for key, value in inputs.items())
    if isinstance(inputs, tuple | list):
        return tuple(_shape(value) for value in inputs)
    return inputs


def _mapped(change: Any, inputs: Any) -> Any:
    """``inputs`` with ``change`` made to each tensor."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, dict):
        return {key: _mapped(change, value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(_mapped(change, value) for value in inputs)
    return inputs


def _joined(each: Sequence[Any]) -> Any:
    """The inputs of several calls, one behind the other."""
    first = each[0]
    if isinstance(first, Tensor):
        return torch.cat(list(each))
    if isinstance(first, dict):
        return {key: _joined([one[key] for one in each]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(_joined([one[i] for one in each]) for i in range(len(first)))
    return first
