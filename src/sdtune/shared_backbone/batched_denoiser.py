"""One denoiser forward pass for several runs, each with its own LoRA pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdtune.hardware.precision import default_dtype
from sdtune.shared_backbone.batched_lora import BatchedLoRALayer, CurrentBatch
from sdtune.shared_backbone.padding import LoRAPair, PaddedPairs, Padding
from sdtune.training.gradient_checkpointing import checkpoint_activations


@dataclass(frozen=True)
class Mode:
    """Global torch state that determines how a call is computed."""

    gradients: bool
    training: bool
    autocast: tuple[bool, torch.dtype]
    default: torch.dtype

    @contextmanager
    def entered(self, kind: str) -> Iterator[None]:
        """Context manager that sets this state in the current thread; ``kind`` is the device type."""
        enabled, dtype = self.autocast
        with (
            default_dtype(self.default),
            torch.set_grad_enabled(self.gradients),
            torch.autocast(kind, dtype, enabled=enabled),
        ):
            yield


class BatchedDenoiser:
    """Denoiser that computes the forward passes of several runs as one batch.

    Args:
        denoiser: denoiser without LoRA pairs. A layer is wrapped as soon as a run has a pair there.
        checkpointing: whether to recompute activations in backward.
        rank: rank to which pairs are padded.
        drops: whether any run of the sweep has dropout. Then all runs are computed as with dropout, so that their
            results do not change when the run with dropout ends.
    """

    def __init__(self, denoiser: Any, checkpointing: bool, rank: int, drops: bool) -> None:
        self._denoiser, self._drops = denoiser, drops
        self._wrapped: set[str] = set()
        self._present, self._padding = CurrentBatch(), Padding(rank)
        if checkpointing:
            # Blocks are recomputed in backward, when the batch may consist of other runs.
            present = self._present
            checkpoint_activations(denoiser, context_fn=lambda: (nullcontext(), self._with_stacks(present.stacks)))

    def __call__(
        self,
        pairs: Sequence[Mapping[str, LoRAPair]],
        inputs: Sequence[Mapping[str, Any]],
        mode: Mode,
        seeds: Sequence[int],
    ) -> Sequence[Tensor]:
        """Denoiser output for each run.

        Args:
            pairs: for each run, its LoRA pairs by layer name.
            inputs: for each run, the arguments of the denoiser; equal shapes.
            mode: torch state of the calls.
            seeds: for each run, the seed of its dropout.
        """
        if self._denoiser.training != mode.training:
            self._denoiser.train(mode.training)
        for name in {name for run_pairs in pairs for name in run_pairs} - self._wrapped:
            self._wrap(name)
        present = {name: [run_pairs.get(name) for run_pairs in pairs] for name in self._wrapped}
        kind = self._denoiser.device.type
        with mode.entered(kind):
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._denoiser.dtype
            self._present.stacks = {}  # frees the pairs of the last call before new ones are allocated
            # Dropout is stored with the pairs: at recomputation, a later call may have changed the model's mode.
            self._present.stacks = self._padding.stacks(
                present, dtype, seeds if mode.training and self._drops else None
            )
            out: Tensor = self._denoiser(**joined(inputs)).sample
        return out.chunk(len(inputs))

    def _wrap(self, name: str) -> None:
        parent, _, attribute = name.rpartition(".")
        holder = self._denoiser.get_submodule(parent)
        layer = getattr(holder, attribute)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        setattr(holder, attribute, BatchedLoRALayer(layer, name, self._present))
        self._wrapped.add(name)

    @contextmanager
    def _with_stacks(self, stacks: Mapping[str, PaddedPairs]) -> Iterator[None]:
        current, self._present.stacks = self._present.stacks, stacks
        try:
            yield
        finally:
            self._present.stacks = current


def shape(inputs: Any) -> Any:
    """Shapes and dtypes of nested ``inputs``; calls with equal results can be one batch."""
    if isinstance(inputs, Tensor):
        return (tuple(inputs.shape), inputs.dtype)
    if isinstance(inputs, dict):
        return tuple((key, shape(value)) for key, value in inputs.items())
    if isinstance(inputs, tuple | list):
        return tuple(shape(value) for value in inputs)
    return inputs


def map_tensors(change: Any, inputs: Any) -> Any:
    """Apply ``change`` to each tensor of nested ``inputs``."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, dict):
        return {key: map_tensors(change, value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(map_tensors(change, value) for value in inputs)
    return inputs


def joined(each: Sequence[Any]) -> Any:
    """Concatenate the nested inputs of several calls along the batch dimension."""
    first = each[0]
    if isinstance(first, Tensor):
        return torch.cat(list(each))
    if isinstance(first, dict):
        return {key: joined([inputs[key] for inputs in each]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(joined([inputs[i] for inputs in each]) for i in range(len(first)))
    return first
