"""``Conditioning``: the text embeddings and image sizes that condition a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Conditioning:
    """What conditions a denoiser besides the noisy latents and the timestep; the first dimension is the batch.

    Attributes:
        states: hidden states of the text encoders, [B, L, D].
        pooled: pooled text embeddings, [B, P]; None if the denoiser has none.
        frame: size conditions in pixels, float32 [B, 6]: original height and width of the image, top and left of its
            crop, height and width of the crop (``time_ids`` of SDXL in diffusers). If None, a denoiser that needs them
            gets those of an uncropped image of the latents' size.
        mask: bool [B, L], False for the states that take no part; None: all take part.
    """

    states: Tensor
    pooled: Tensor | None = None
    frame: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not None, by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply ``change`` to each tensor."""
        return Conditioning(**{name: change(value) for name, value in self.tensors().items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """Copy on ``device``; Lightning moves batches with it. From pinned memory, the copy is asynchronous."""
        return self.map(lambda value: value.to(device, non_blocking=value.is_pinned()))

    def pin_memory(self) -> Conditioning:
        """Copy in page-locked memory; torch's data loader calls it."""
        return self.map(Tensor.pin_memory)

    def cast(self, dtype: torch.dtype) -> Conditioning:
        """States and pooled embeddings in ``dtype``; half precision would round the sizes in pixels."""
        cast = {name: value.to(dtype) for name, value in self.tensors().items() if name in ("states", "pooled")}
        return Conditioning(**{**self.tensors(), **cast})

    def expand(self, count: int) -> Conditioning:
        """Repeat a conditioning of batch size 1 ``count`` times, without copies."""
        return self.map(lambda value: value.expand(count, *value.shape[1:]))

    def rows(self) -> list[dict[str, Tensor]]:
        """The tensors of each sample, without the batch dimension, by field name."""
        tensors = self.tensors()
        return [{name: value[row] for name, value in tensors.items()} for row in range(len(self))]


def stack_rows(rows: Sequence[Mapping[str, Tensor]]) -> Conditioning:
    """Conditioning of a batch from the tensors of its samples: the inverse of :meth:`Conditioning.rows`."""
    assert all(row.keys() == rows[0].keys() for row in rows)
    return Conditioning(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenate along the batch dimension."""
    tensors = [part.tensors() for part in parts]
    assert all(part.keys() == tensors[0].keys() for part in tensors)
    return Conditioning(**{name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})
