"""One UNet forward for several runs, each with its own LoRA pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdtune.shared_backbone.batched_lora import Present, Stacked
from sdtune.shared_backbone.padding import Padding, Pair, Stack
from sdtune.training.gradient_checkpointing import checkpoint_activations


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


class Joint:
    """``unet`` without pairs, on which a site opens as soon as a run has a pair there.

    Args:
        checkpointing: compute activations again in backward.
        rank: to which pairs are padded.
        drops: whether any run that will come has dropout: all are computed as it has to be then, so that the sums of
            the others stay as they are when it leaves.
    """

    def __init__(self, unet: UNet2DConditionModel, checkpointing: bool, rank: int, drops: bool) -> None:
        self._unet, self._drops = unet, drops
        self._sites: set[str] = set()
        self._present, self._padding = Present(), Padding(rank)
        if checkpointing:
            # Blocks are computed again within backward, when others may be in the batch.
            now = self._present
            checkpoint_activations(unet, context_fn=lambda: (nullcontext(), self._again(now.stacks)))

    def __call__(
        self,
        pairs: Sequence[Mapping[str, Pair]],
        inputs: Sequence[Mapping[str, Any]],
        mode: Mode,
        seeds: Sequence[int],
    ) -> Sequence[Tensor]:
        """What the UNet says to each run's ``inputs`` under its ``pairs``, which are by the name of their site.

        ``seeds`` are of the runs' dropout.
        """
        if self._unet.training != mode.training:
            self._unet.train(mode.training)
        for name in {name for own in pairs for name in own} - self._sites:
            self._open(name)
        present = {name: [own.get(name) for own in pairs] for name in self._sites}
        kind = self._unet.device.type
        with mode.entered(kind):
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._unet.dtype
            self._present.stacks = {}  # of the last call, before there are this one's beside them
            # Kept with the pairs: what is computed again in backward finds the model as a later call has left it.
            self._present.stacks = self._padding.stacks(
                present, dtype, seeds if mode.training and self._drops else None
            )
            out: Tensor = self._unet(**joined(inputs)).sample
        return out.chunk(len(inputs))

    def _open(self, name: str) -> None:
        parent, _, own = name.rpartition(".")
        holder = self._unet.get_submodule(parent)
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


def shape(inputs: Any) -> Any:
    """What two calls must have in common to be one: the tensors' shapes and types, by place."""
    if isinstance(inputs, Tensor):
        return (tuple(inputs.shape), inputs.dtype)
    if isinstance(inputs, dict):
        return tuple((key, shape(value)) for key, value in inputs.items())
    if isinstance(inputs, tuple | list):
        return tuple(shape(value) for value in inputs)
    return inputs


def mapped(change: Any, inputs: Any) -> Any:
    """``inputs`` with ``change`` made to each tensor."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, dict):
        return {key: mapped(change, value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(mapped(change, value) for value in inputs)
    return inputs


def joined(each: Sequence[Any]) -> Any:
    """The inputs of several calls, one behind the other."""
    first = each[0]
    if isinstance(first, Tensor):
        return torch.cat(list(each))
    if isinstance(first, dict):
        return {key: joined([one[key] for one in each]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(joined([one[i] for one in each]) for i in range(len(first)))
    return first
