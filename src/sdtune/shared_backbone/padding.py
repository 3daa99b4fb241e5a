"""LoRA pairs of several runs padded to one tensor per layer, for batched products."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdtune.torch_compat import foreach_copy_, foreach_mul, foreach_mul_


class LoRAPair(NamedTuple):
    """LoRA pair of a run for one layer: A [r, in], B [out, r]; for a convolution [r, in, k, k] and [out, r, 1, 1]."""

    down: Tensor
    up: Tensor
    scale: float
    dropout: float


class PaddedPairs(NamedTuple):
    """Padded pairs of a layer: A [N, R, in] and B [N, R, out] times scale; zeros pad missing and smaller pairs.

    ``dropouts``: for each run its dropout probability and seed in this call; None if no run drops inputs.
    """

    downs: Tensor
    ups: Tensor
    dropouts: tuple[tuple[float, int], ...] | None


class Layout(NamedTuple):
    """Layout of a layer's padded tensors: N, R, and for each pair the index of its run, its rank and its scale."""

    runs: int
    rank: int
    pairs: tuple[tuple[int, int, float], ...]


@dataclass
class Buffer:
    """Memory of padded pairs: ``blocks`` are A and B of each layer in turn, ``parts`` views of each pair in them."""

    blocks: list[Tensor]
    parts: list[Tensor]
    scales: list[Tensor] | None
    needed_by_backward: bool = False
    """Whether a pending backward pass needs the contents."""


class Padding:
    """Pads LoRA pairs to a common ``rank``, the largest of all runs of the sweep.

    Shapes, and so the summation order, stay the same when a run ends or starts. A step reuses the buffer of the last
    step if its layout is the same, unless a pending backward pass needs the contents.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._layout: Any = None
        self._buffer: Buffer | None = None

    def stacks(
        self, pairs: Mapping[str, Sequence[LoRAPair | None]], dtype: torch.dtype, seeds: Sequence[int] | None
    ) -> dict[str, PaddedPairs]:
        """Padded pairs in ``dtype`` by layer name, for layers with a pair.

        ``seeds``: dropout seed of each run; None disables dropout.
        """
        sites: list[Layout] = []
        flat: list[Tensor] = []
        layer_dropouts: dict[str, tuple[tuple[float, int], ...] | None] = {}
        for name, run_pairs in pairs.items():
            present = [(index, pair) for index, pair in enumerate(run_pairs) if pair is not None]
            if not present:
                continue
            self._rank = max(self._rank, *(len(pair.down) for _, pair in present))
            sites.append(Layout(len(run_pairs), self._rank, tuple((i, len(p.down), p.scale) for i, p in present)))
            flat += [part.flatten(1) for _, pair in present for part in (pair.down, pair.up)]
            layer_dropouts[name] = None
            if seeds is not None:
                probabilities = [0.0 if pair is None else pair.dropout for pair in run_pairs]
                # The CPU generator uses 32 bits of a seed; Python's hash() differs between processes.
                layer_seeds = [zlib.crc32(f"{seed}/{name}".encode()) for seed in seeds]
                layer_dropouts[name] = tuple(zip(probabilities, layer_seeds, strict=True))
        if not layer_dropouts:
            return {}
        buffer = self._get_buffer(sites, dtype, flat)
        buffer.needed_by_backward = torch.is_grad_enabled() and any(part.requires_grad for part in flat)
        tensors = PadPairs.apply(sites, buffer, *flat)  # type: ignore[no-untyped-call]
        return {
            name: PaddedPairs(downs, ups, dropouts)
            for (name, dropouts), downs, ups in zip(layer_dropouts.items(), tensors[::2], tensors[1::2], strict=True)
        }

    def _get_buffer(self, sites: list[Layout], dtype: torch.dtype, flat: Sequence[Tensor]) -> Buffer:
        firsts = itertools.accumulate((2 * len(site.pairs) for site in sites[:-1]), initial=0)
        widths = [(flat[first].shape[1], flat[first + 1].shape[0]) for first in firsts]
        layout = (sites, widths, dtype, flat[0].device)
        if self._buffer is None or self._buffer.needed_by_backward or self._layout != layout:
            self._buffer = None  # frees the old buffer before a new one is allocated
            self._layout, self._buffer = layout, _allocate(sites, widths, dtype, flat[0])
        return self._buffer


def _allocate(sites: Sequence[Layout], widths: Sequence[tuple[int, int]], dtype: torch.dtype, like: Tensor) -> Buffer:
    shapes = [(s.runs, s.rank, width) for s, both in zip(sites, widths, strict=True) for width in both]
    sizes = [n * r * width for n, r, width in shapes]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=like.device)
    blocks = [block.view(shape) for block, shape in zip(torch.split(flat, sizes), shapes, strict=True)]
    rows = [[1.0] * site.runs for site in sites]
    for row, site in zip(rows, sites, strict=True):
        for index, _, scale in site.pairs:
            row[index] = scale
    # One transfer for all scales, because each transfer to a device synchronizes.
    scaled = any(value != 1 for row in rows for value in row)
    scales = list(like.new_tensor(rows)[:, :, None, None].unbind()) if scaled else None
    return Buffer(blocks, _part_views(sites, blocks), scales)


class PadPairs(torch.autograd.Function):
    """Autograd function that pads the pairs of all layers with a few multi-tensor operators.

    Separate operators would be dozens per layer, for hundreds of layers. On a GPU, the copies still need one kernel per
    tensor, because the strides differ.
    """

    @staticmethod
    def forward(ctx: Any, sites: Sequence[Layout], buffer: Buffer, *parts: Tensor) -> Any:
        """Return padded A and B of each layer in turn; ``parts`` are A [r, in] and B [out, r] of each pair in turn."""
        foreach_copy_(buffer.parts, parts)
        if buffer.scales is not None:
            foreach_mul_(buffer.blocks[1::2], buffer.scales)
        ctx.sites, ctx.buffer, ctx.dtype = sites, buffer, parts[0].dtype
        # Return views: the blocks themselves would join this step's autograd graph and could not be written again.
        return tuple(block.view_as(block) for block in buffer.blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.buffer.needed_by_backward = False
        scales = ctx.buffer.scales
        ups = gradients[1::2] if scales is None else foreach_mul(gradients[1::2], scales)
        blocks = [part.contiguous() for pair in zip(gradients[::2], ups, strict=True) for part in pair]
        parts = _part_views(ctx.sites, blocks)
        # Contiguous and in the parameters' dtype, so that autograd stores the gradients without a copy.
        part_gradients = [torch.empty(part.shape, dtype=ctx.dtype, device=part.device) for part in parts]
        foreach_copy_(part_gradients, parts)
        return None, None, *part_gradients


def _part_views(sites: Sequence[Layout], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of each pair's part in ``tensors``, which are contiguous A and B of each layer in turn; B as [out, r]."""
    views = []
    for site, downs, ups in zip(sites, tensors[::2], tensors[1::2], strict=True):
        in_features, out_features = downs.shape[2], ups.shape[2]
        down_at, up_at = downs.storage_offset(), ups.storage_offset()
        for index, rank, _ in site.pairs:
            offset = index * site.rank
            # as_strided instead of slices: thousands of slices per step cost milliseconds.
            views.append(downs.as_strided((rank, in_features), (in_features, 1), down_at + offset * in_features))
            views.append(ups.as_strided((out_features, rank), (1, out_features), up_at + offset * out_features))
    return views


class LoRALinear(torch.autograd.Function):
    """Autograd function x W^T + b + (x A^T) B for N runs whose samples are concatenated.

    The product with W is computed once for all runs, those with A and B as batched products. Separate operators would
    allocate a tensor for each product before adding it, in forward and in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, downs: Tensor, ups: Tensor) -> Tensor:
        """Return [N * M, ..., out] for x [N * M, ..., in], A [N, R, in] and B [N, R, out]; W and b are frozen."""
        count = len(downs)
        x = x.to(downs.dtype)
        out = torch.nn.functional.linear(x, weight, bias)
        rows = x.reshape(count, -1, x.shape[-1])
        low = torch.bmm(rows, downs.transpose(1, 2))
        out.view(count, -1, out.shape[-1]).baddbmm_(low, ups)
        ctx.save_for_backward(rows, low, weight, downs, ups)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, downs, ups = ctx.saved_tensors
        grad_out = gradient.reshape(len(downs), -1, gradient.shape[-1])
        grad_low = torch.bmm(grad_out, ups.transpose(1, 2))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(gradient, weight.to(gradient.dtype))
            grad_x.view(len(downs), -1, grad_x.shape[-1]).baddbmm_(grad_low, downs)
        return grad_x, None, None, torch.bmm(grad_low.transpose(1, 2), rows), torch.bmm(low.transpose(1, 2), grad_out)
