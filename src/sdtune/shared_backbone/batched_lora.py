"""Batched LoRA layers: one UNet with the LoRA pairs of several runs, whose samples are concatenated in the batch.

The base is multiplied once for all; the pairs of all runs are two batched products per layer, narrower ones padded with
zeros. Seen before on language models: mLoRA (Ye et al. 2023), LoRAFusion (Zhu et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtune.shared_backbone.padding import Product, Stack


class Present:
    """Whose samples are in the batch: by site the pairs of all runs; a site is left out where none has one."""

    def __init__(self) -> None:
        self.stacks: Mapping[str, Stack] = {}


class Stacked(nn.Module):
    """A frozen layer with a pair for each of several runs; the batch holds equal shares of them, one after another.

    Args:
        base: a linear layer or a convolution.
        name: the site's.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, name: str, present: Present) -> None:
        super().__init__()
        self.base = base
        self._name, self._present = name, present

    def forward(self, x: Tensor) -> Tensor:
        stack = self._present.stacks.get(self._name)
        if stack is None:
            out: Tensor = self.base(x)
            return out
        downs, ups, _ = stack
        own = self._dropped(x, stack)
        half = torch.is_autocast_enabled(x.device.type) or self.base.weight.dtype == downs.dtype
        if isinstance(self.base, nn.Linear) and own is x and half:
            both: Tensor = Product.apply(x, self.base.weight, self.base.bias, downs, ups)  # type: ignore[no-untyped-call]
            return both
        out, own = self.base(x), own.to(downs.dtype)
        if isinstance(self.base, nn.Conv2d):
            return out + _convolved(self.base, own, downs, ups).to(out.dtype)
        low = torch.bmm(own.reshape(len(downs), -1, own.shape[-1]), downs.transpose(1, 2))
        return out + torch.bmm(low, ups).reshape(out.shape).to(out.dtype)

    def _dropped(self, x: Tensor, stack: Stack) -> Tensor:
        if stack.dropouts is None:
            return x
        rows = x.chunk(len(stack.dropouts))
        return torch.cat([_masked(part, *own) for part, own in zip(rows, stack.dropouts, strict=True)])


def _masked(x: Tensor, share: float, seed: int) -> Tensor:
    """Dropout whose mask hangs on nothing but ``seed``: no neighbour's draw moves it, nor a pass that is repeated."""
    if share == 0:
        return x
    source = torch.Generator(x.device).manual_seed(seed)
    return x * torch.empty_like(x).bernoulli_(1 - share, generator=source).div_(1 - share)


def _convolved(base: nn.Conv2d, x: Tensor, downs: Tensor, ups: Tensor) -> Tensor:
    """By grouped convolutions, which want the runs side by side in the channels."""
    count, rank = downs.shape[:2]
    side = torch.cat(x.chunk(count), dim=1)
    kernels = downs.reshape(count * rank, base.in_channels, *base.kernel_size)
    low = F.conv2d(side, kernels, None, base.stride, base.padding, base.dilation, groups=count)
    high = ups.transpose(1, 2).reshape(count * base.out_channels, rank, 1, 1)
    return torch.cat(F.conv2d(low, high, groups=count).chunk(count, dim=1))
