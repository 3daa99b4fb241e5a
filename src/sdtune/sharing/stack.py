"""One UNet under the low-rank pairs of several runs at once: their samples lie behind each other in the batch.

The base is multiplied once for all; the pairs of all runs are two batched products a site, narrower ones padded with
zeros. Seen before on language models: mLoRA (Ye et al. 2023), LoRAFusion (Zhu et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pair(NamedTuple):
    """A run's pair at a site: A [r, in] and B [out, r] (of a convolution [r, in, k, k] and [out, r, 1, 1])."""

    down: Tensor
    up: Tensor
    scale: float
    dropout: float


class Present:
    """Whose samples are in the batch: for each site a pair of each run, None where one has none there."""

    def __init__(self) -> None:
        self.pairs: Mapping[str, Sequence[Pair | None]] = {}


class Stacked(nn.Module):
    """A frozen layer with a pair for each of several runs; the batch holds equal shares of them, one after another.

    Args:
        base: a linear layer or a convolution.
        name: the site's.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, name: str, present: Present) -> None:
        super().__init__()
        self.base = base
        self.rank = 0
        """The largest rank seen: shapes, and with them the order of every sum, stay when a run leaves."""
        self._name, self._present = name, present
        self._rows: tuple[tuple[int, ...], Tensor] | None = None
        self._scales: tuple[tuple[float, ...], Tensor] | None = None

    @property
    def _pairs(self) -> Sequence[Pair | None]:
        return self._present.pairs[self._name]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if all(pair is None for pair in self._pairs):
            return out
        own = self._dropped(x)
        downs, ups = self._padded(x.device)
        if not torch.is_autocast_enabled(x.device.type):
            own = own.to(downs.dtype)
        scales = self._scaling(downs)
        if isinstance(self.base, nn.Conv2d):
            return out + self._convolved(own, downs, ups, scales).to(out.dtype)
        count = len(self._pairs)
        low = torch.bmm(own.reshape(count, -1, own.shape[-1]), downs.transpose(1, 2)) * scales[:, None, None]
        high = torch.bmm(low, ups.transpose(1, 2))
        return out + high.reshape(out.shape).to(out.dtype)

    def _convolved(self, x: Tensor, downs: Tensor, ups: Tensor, scales: Tensor) -> Tensor:
        """By grouped convolutions, which want the runs side by side in the channels."""
        base, count = self.base, len(self._pairs)
        assert isinstance(base, nn.Conv2d)
        side = torch.cat(x.chunk(count), dim=1)
        kernels = downs.reshape(count * self.rank, base.in_channels, *base.kernel_size)
        low = F.conv2d(side, kernels, None, base.stride, base.padding, base.dilation, groups=count)
        low = low * scales.repeat_interleave(self.rank)[:, None, None]
        high = F.conv2d(low, ups.reshape(count * base.out_channels, self.rank, 1, 1), groups=count)
        return torch.cat(high.chunk(count, dim=1))

    def _dropped(self, x: Tensor) -> Tensor:
        shares = [0.0 if pair is None else pair.dropout for pair in self._pairs]
        if not self.training or not any(shares):
            return x
        rows = x.chunk(len(shares))
        return torch.cat([F.dropout(part, share) for part, share in zip(rows, shares, strict=True)])

    def _padded(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A [N, R, in...] and B [N, out, R], rows and columns beyond a run's own rank zero."""
        present = [pair for pair in self._pairs if pair is not None]
        self.rank = max(self.rank, *(len(pair.down) for pair in present))
        downs, ups = [p.down.flatten(1) for p in present], [p.up.flatten(1).t() for p in present]
        count = len(self._pairs)
        if len(present) == count and all(len(down) == self.rank for down in downs):
            return torch.stack(downs), torch.stack(ups).transpose(1, 2)
        rows = self._places(device)
        padded: list[Tensor] = []
        for parts in (downs, ups):
            zero = parts[0].new_zeros(1, parts[0].shape[1])
            padded.append(torch.cat([*parts, zero]).index_select(0, rows).view(count, self.rank, -1))
        return padded[0], padded[1].transpose(1, 2)

    def _scaling(self, like: Tensor) -> Tensor:
        """[N], of the pairs' type."""
        scales = tuple(0.0 if pair is None else pair.scale for pair in self._pairs)
        if self._scales is None or self._scales[0] != scales:
            self._scales = (scales, torch.tensor(scales, device=like.device, dtype=like.dtype))
        return self._scales[1]

    def _places(self, device: torch.device) -> Tensor:
        """For each row of the padded pairs which row it is of those laid one after another, whose last is zero."""
        ranks = tuple(0 if pair is None else len(pair.down) for pair in self._pairs)
        if self._rows is None or self._rows[0] != (self.rank, *ranks):
            rows: list[int] = []
            begin = 0
            for rank in ranks:
                rows += [*range(begin, begin + rank), *[sum(ranks)] * (self.rank - rank)]
                begin += rank
            self._rows = ((self.rank, *ranks), torch.tensor(rows, device=device))
        return self._rows[1]
