"""Convolutions of many channels over few pixels, as the products that they are.

A CPU's convolution kernels are made for many pixels. Where there are fewer of those than of channels, as at the lowest
resolutions of a UNet, the weights are nearly all that is moved, and the kernels move them several times.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PIXELS = 256
_WEIGHTS = 640 * 1280
"""At most so many pixels of a batch, and at least so many weights a tap, for a product to be faster on two cores with
and without AMX, in float32 and bfloat16, forward and back (``make bench``)."""


class FewPixels(nn.Conv2d):
    """A convolution that gathers the pixels under its kernel and multiplies once, where they are few and on a CPU.

    Weights in ``channels_last`` are taken as they lie.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, out, H', W'] from [B, in, H, W]."""
        assert not isinstance(self.padding, str)
        high, wide = (
            (side + 2 * pad - size) // step + 1
            for side, pad, size, step in zip(x.shape[2:], self.padding, self.kernel_size, self.stride, strict=True)
        )
        if x.device.type != "cpu" or len(x) * high * wide > _PIXELS:
            return super().forward(x)
        (up, left), (down, right) = self.padding, self.stride
        lines = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, up, up))
        taps = [
            lines[:, i : i + down * (high - 1) + 1 : down, j : j + right * (wide - 1) + 1 : right]
            for i in range(self.kernel_size[0])
            for j in range(self.kernel_size[1])
        ]
        out = F.linear(torch.cat(taps, -1).flatten(0, 2), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return out.view(len(x), high, wide, -1).permute(0, 3, 1, 2)


def as_products(model: nn.Module) -> None:
    """Have the convolutions of ``model`` that have weights enough go that way; their parameters stay what they are."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _plain(module) and module.in_channels * module.out_channels >= _WEIGHTS:
            module.__class__ = FewPixels


def _plain(module: nn.Conv2d) -> bool:
    return (
        module.groups == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )
