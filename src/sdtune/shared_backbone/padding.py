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


class Pair(NamedTuple):
    """A run's pair at a site: A [r, in] and B [out, r] (of a convolution [r, in, k, k] and [out, r, 1, 1])."""

    down: Tensor
    up: Tensor
    scale: float
    dropout: float


class Stack(NamedTuple):
    """A site's pairs: A [N, R, in] and B [N, R, out], its scale in it; zero where a run has none, or a narrower one.

    ``dropouts``: of each run the share that it drops in this call, which may be none, and its seed; or None for all.
    """

    downs: Tensor
    ups: Tensor
    dropouts: tuple[tuple[float, int], ...] | None


class Layout(NamedTuple):
    """How a site's tensors are laid out: N, R, and of each pair its place, its rank and its scale."""

    runs: int
    rank: int
    pairs: tuple[tuple[int, int, float], ...]


@dataclass
class Buffer:
    """Where pairs are padded: A and B of each site by turns, and in them the part of each pair; the rest is zero."""

    blocks: list[Tensor]
    parts: list[Tensor]
    scales: list[Tensor] | None
    awaited: bool = False
    """Whether what lies in it is needed for a backward that is to come."""


class Padding:
    """Pads pairs to a common ``rank``, the largest of all runs that will come: shapes, and with them the order of every
    sum, stay when a run leaves or comes.

    A step takes the buffer of the last one of its layout, zeros and all, unless that one's backward is still to come.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._layout: Any = None
        self._buffer: Buffer | None = None

    def stacks(
        self, pairs: Mapping[str, Sequence[Pair | None]], dtype: torch.dtype, seeds: Sequence[int] | None
    ) -> dict[str, Stack]:
        """By site, for those at which a run has a pair, in ``dtype``; ``seeds`` where runs drop, None for none."""
        sites: list[Layout] = []
        flat: list[Tensor] = []
        found: dict[str, tuple[tuple[float, int], ...] | None] = {}
        for name, own in pairs.items():
            present = [(place, pair) for place, pair in enumerate(own) if pair is not None]
            if not present:
                continue
            self._rank = max(self._rank, *(len(pair.down) for _, pair in present))
            sites.append(Layout(len(own), self._rank, tuple((i, len(p.down), p.scale) for i, p in present)))
            flat += [part.flatten(1) for _, pair in present for part in (pair.down, pair.up)]
            found[name] = None
            if seeds is not None:
                shares = [0.0 if pair is None else pair.dropout for pair in own]
                # 32 bits, as many as the CPU's generator looks at; Python's own hash is another in each process.
                own_seeds = [zlib.crc32(f"{seed}/{name}".encode()) for seed in seeds]
                found[name] = tuple(zip(shares, own_seeds, strict=True))
        if not found:
            return {}
        buffer = self._fitting(sites, dtype, flat)
        buffer.awaited = torch.is_grad_enabled() and any(part.requires_grad for part in flat)
        tensors = Padded.apply(sites, buffer, *flat)  # type: ignore[no-untyped-call]
        return {
            name: Stack(downs, ups, dropouts)
            for (name, dropouts), downs, ups in zip(found.items(), tensors[::2], tensors[1::2], strict=True)
        }

    def _fitting(self, sites: list[Layout], dtype: torch.dtype, flat: Sequence[Tensor]) -> Buffer:
        firsts = itertools.accumulate((2 * len(site.pairs) for site in sites[:-1]), initial=0)
        widths = [(flat[first].shape[1], flat[first + 1].shape[0]) for first in firsts]
        layout = (sites, widths, dtype, flat[0].device)
        if self._buffer is None or self._buffer.awaited or self._layout != layout:
            self._buffer = None  # before there are two
            self._layout, self._buffer = layout, _buffer(sites, widths, dtype, flat[0])
        return self._buffer


def _buffer(sites: Sequence[Layout], widths: Sequence[tuple[int, int]], dtype: torch.dtype, like: Tensor) -> Buffer:
    shapes = [(s.runs, s.rank, width) for s, both in zip(sites, widths, strict=True) for width in both]
    sizes = [n * r * width for n, r, width in shapes]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=like.device)
    blocks = [block.view(shape) for block, shape in zip(torch.split(flat, sizes), shapes, strict=True)]
    rows = [[1.0] * site.runs for site in sites]
    for row, site in zip(rows, sites, strict=True):
        for place, _, scale in site.pairs:
            row[place] = scale
    # All at once: to bring anything to a device is to wait for it.
    scaled = any(value != 1 for row in rows for value in row)
    scales = list(like.new_tensor(rows)[:, :, None, None].unbind()) if scaled else None
    return Buffer(blocks, _own(sites, blocks), scales)


class Padded(torch.autograd.Function):
    """All sites by a few operators: a site's own would be dozens, and a UNet has hundreds of sites.

    On a GPU the copies are a kernel a tensor still, since their strides differ.
    """

    @staticmethod
    def forward(ctx: Any, sites: Sequence[Layout], buffer: Buffer, *parts: Tensor) -> Any:
        """A and B of each site by turns; ``parts`` are A [r, in] and B [out, r] by turns."""
        foreach_copy_(buffer.parts, parts)
        if buffer.scales is not None:
            foreach_mul_(buffer.blocks[1::2], buffer.scales)
        ctx.sites, ctx.buffer, ctx.dtype = sites, buffer, parts[0].dtype
        # Views: the blocks themselves would belong to this step's graph, and could not be written again.
        return tuple(block.view_as(block) for block in buffer.blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.buffer.awaited = False
        scales = ctx.buffer.scales
        ups = gradients[1::2] if scales is None else foreach_mul(gradients[1::2], scales)
        both = [part.contiguous() for pair in zip(gradients[::2], ups, strict=True) for part in pair]
        padded = _own(ctx.sites, both)
        # In the parameters' type and order, for autograd to keep as they are.
        own = [torch.empty(part.shape, dtype=ctx.dtype, device=part.device) for part in padded]
        foreach_copy_(own, padded)
        return None, None, *own


def _own(sites: Sequence[Layout], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of contiguous A and B of each site by turns, the part of each pair, B as [out, r]."""
    found = []
    for site, downs, ups in zip(sites, tensors[::2], tensors[1::2], strict=True):
        across, up = downs.shape[2], ups.shape[2]
        down_at, up_at = downs.storage_offset(), ups.storage_offset()
        for place, rank, _ in site.pairs:
            first = place * site.rank
            # By hand: thousands of slices per step are milliseconds.
            found.append(downs.as_strided((rank, across), (across, 1), down_at + first * across))
            found.append(ups.as_strided((up, rank), (1, up), up_at + first * up))
    return found


class Product(torch.autograd.Function):
    """x W^T + b + (x A^T) B for N runs whose samples lie behind each other: the base once, the pairs in batches.

    As plain operators each product would be a tensor of its own before it is added, forward and back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, downs: Tensor, ups: Tensor) -> Tensor:
        """[N * M, ..., out] from x [N * M, ..., in], A [N, R, in] and B [N, R, out]; the base is frozen."""
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
        above = gradient.reshape(len(downs), -1, gradient.shape[-1])
        below = torch.bmm(above, ups.transpose(1, 2))
        own = None
        if ctx.needs_input_grad[0]:
            own = torch.matmul(gradient, weight.to(gradient.dtype))
            own.view(len(downs), -1, own.shape[-1]).baddbmm_(below, downs)
        return own, None, None, torch.bmm(below.transpose(1, 2), rows), torch.bmm(low.transpose(1, 2), above)
