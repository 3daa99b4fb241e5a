"""Convolutions with many channels and few pixels as matrix products, faster on a CPU.

CPU convolution kernels are optimized for many pixels. With fewer pixels than channels, as at the lowest resolutions of
a UNet, nearly all memory traffic is weights, and these kernels read the weights several times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_PIXELS = 256
_WEIGHTS = 640 * 1280
"""A matrix product is used for at most ``_PIXELS`` output pixels per batch and at least ``_WEIGHTS`` weights per kernel
position. Measured on two cores with AMX, frozen weights, forward and backward: within these limits a matrix product is
faster in float32 and bfloat16; outside of them the convolution is faster."""


class MatmulConv2d(nn.Conv2d):
    """Conv2d that uses im2col and one matrix product on a CPU for outputs with few pixels.

    Weights in ``channels_last`` memory format are used without a copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Output [B, out, H', W'] for ``x`` [B, in, H, W]."""
        assert not isinstance(self.padding, str)
        height, width = (
            (side + 2 * pad - size) // step + 1
            for side, pad, size, step in zip(x.shape[2:], self.padding, self.kernel_size, self.stride, strict=True)
        )
        # Planning for a CPU runs on the meta device.
        if x.device.type not in ("cpu", "meta") or len(x) * height * width > _PIXELS:
            return super().forward(x)
        pixels = x.permute(0, 2, 3, 1)
        if self.kernel_size != (1, 1) or self.stride != (1, 1) or self.padding != (0, 0):
            pixels = Im2Col.apply(pixels, Kernel(self.kernel_size, self.stride, self.padding, (height, width)))  # type: ignore[no-untyped-call, arg-type]
        out = F.linear(pixels.flatten(0, 2), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return out.view(len(x), height, width, -1).permute(0, 3, 1, 2)


class Kernel(NamedTuple):
    """Geometry of a convolution kernel, each as (rows, columns); ``out`` is the output size."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    out: tuple[int, int]

    def taps(self, padded: Tensor) -> list[Tensor]:
        """Input pixels for each kernel position: views [B, H', W', C] of the padded input ``padded`` [B, H, W, C]."""
        (height, width), (step_y, step_x) = self.out, self.stride
        return [
            padded[:, y : y + step_y * (height - 1) + 1 : step_y, x : x + step_x * (width - 1) + 1 : step_x]
            for y in range(self.size[0])
            for x in range(self.size[1])
        ]


class Im2Col(torch.autograd.Function):
    """im2col: [B, H', W', taps * C] from [B, H, W, C].

    Custom backward, because autograd would add the taps' gradients in their own dtype and, in half precision, round
    after each addition; a convolution rounds only once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel) -> Tensor:
        ctx.kernel, ctx.shape = kernel, x.shape
        rows, columns = kernel.padding
        return torch.cat(kernel.taps(F.pad(x, (0, 0, columns, columns, rows, rows))), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        count, height, width, channels = ctx.shape
        rows, columns = ctx.kernel.padding
        sum_dtype = torch.promote_types(gradient.dtype, torch.float32)
        padded_gradient = gradient.new_zeros((count, height + 2 * rows, width + 2 * columns, channels), dtype=sum_dtype)
        for tap, tap_gradient in zip(
            ctx.kernel.taps(padded_gradient), torch.split(gradient, channels, -1), strict=True
        ):
            tap += tap_gradient
        return padded_gradient[:, rows : rows + height, columns : columns + width].to(gradient.dtype), None


def use_matmul_convolutions(model: nn.Module) -> None:
    """Turn the convolutions of ``model`` with enough weights into :class:`MatmulConv2d`; parameters are unchanged."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_supported(module) and module.in_channels * module.out_channels >= _WEIGHTS:
            module.__class__ = MatmulConv2d


def _is_supported(module: nn.Conv2d) -> bool:
    return (
        module.groups == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )
