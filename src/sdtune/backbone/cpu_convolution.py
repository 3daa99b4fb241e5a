"""Convolutions with many channels and few pixels as matrix products, faster on a CPU.

A CPU's convolution kernels are made for many pixels. Where there are fewer of those than of channels, as at the lowest
resolutions of a UNet, the weights are nearly all that is moved, and the kernels move them several times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_PIXELS = 256
_WEIGHTS = 640 * 1280
"""At most so many pixels of a batch, and at least so many weights a tap. Tried by hand on two cores with AMX, frozen
weights, forward and back: there a product is faster in float32 and in bfloat16, and beyond it is not."""


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
        # A plan for a CPU is made on the meta device.
        if x.device.type not in ("cpu", "meta") or len(x) * high * wide > _PIXELS:
            return super().forward(x)
        lines = x.permute(0, 2, 3, 1)
        if self.kernel_size != (1, 1) or self.stride != (1, 1) or self.padding != (0, 0):
            lines = Gathered.apply(lines, Kernel(self.kernel_size, self.stride, self.padding, (high, wide)))  # type: ignore[no-untyped-call, arg-type]
        out = F.linear(lines.flatten(0, 2), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return out.view(len(x), high, wide, -1).permute(0, 3, 1, 2)


class Kernel(NamedTuple):
    """Where it lies: everything is by rows and by columns. ``out`` counts the places that it takes."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    out: tuple[int, int]

    def taps(self, lines: Tensor) -> list[Tensor]:
        """For each of the kernel's weights what is under it at all places: views [B, H', W', C] of padded lines."""
        (high, wide), (step_y, step_x) = self.out, self.stride
        return [
            lines[:, y : y + step_y * (high - 1) + 1 : step_y, x : x + step_x * (wide - 1) + 1 : step_x]
            for y in range(self.size[0])
            for x in range(self.size[1])
        ]


class Gathered(torch.autograd.Function):
    """[B, H', W', taps * C] from [B, H, W, C].

    By hand for its way back: autograd would add the taps' gradients in their own type, and in half precision round each
    sum, which a convolution does once.
    """

    @staticmethod
    def forward(ctx: Any, lines: Tensor, kernel: Kernel) -> Tensor:
        ctx.kernel, ctx.shape = kernel, lines.shape
        rows, columns = kernel.padding
        return torch.cat(kernel.taps(F.pad(lines, (0, 0, columns, columns, rows, rows))), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        count, high, wide, channels = ctx.shape
        rows, columns = ctx.kernel.padding
        wider = torch.promote_types(gradient.dtype, torch.float32)
        lines = gradient.new_zeros((count, high + 2 * rows, wide + 2 * columns, channels), dtype=wider)
        for tap, part in zip(ctx.kernel.taps(lines), torch.split(gradient, channels, -1), strict=True):
            tap += part
        return lines[:, rows : rows + high, columns : columns + wide].to(gradient.dtype), None


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
