"""LoRA layers for peft with a faster forward pass for a single adapter, and the pairs' cast to half precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sdtune.hardware.precision import autocast_kind


class FusedLoRALinear(Linear):  # type: ignore[misc]
    """LoRA linear layer: W x + scale B (A x), with the last product and the sum in one kernel (Hu et al. 2021, eq. 3).

    All other cases (several adapters, merged weights, DoRA) use peft's forward. It multiplies and adds in separate
    kernels, and casts its input to the pair's dtype: under autocast a copy to float32, which autocast casts back.
    """

    cast_pair: tuple[Tensor, Tensor] | None = None
    """The LoRA matrices A and B, cast to the dtype of the input by :func:`cast_pairs`; None: not cast."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output [..., out] for ``x`` [..., in]."""
        down, up = self.cast_pair or _pair(self)
        # Without autocast, input and LoRA matrices need the same dtype.
        autocast = torch.is_autocast_enabled(autocast_kind(x.device))
        if args or kwargs or not _is_plain(self) or not (autocast or x.dtype == down.dtype):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        base = self.base_layer(x)
        low = F.linear(_dropped(self, x), down)
        total = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=float(self.scaling["default"]))
        return total.view_as(base).to(base.dtype)


class HalfLoRAConv2d(Conv2d):  # type: ignore[misc]
    """LoRA convolution that computes with ``cast_pair``; peft's forward would cast its input to float32."""

    cast_pair: tuple[Tensor, Tensor] | None = None
    """The LoRA matrices A and B, cast to the dtype of the input by :func:`cast_pairs`; None: not cast."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output [B, out, H', W'] for ``x`` [B, in, H, W]."""
        if args or kwargs or not _is_plain(self) or self.cast_pair is None or x.dtype != self.cast_pair[0].dtype:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        down, up = self.cast_pair
        first = self.lora_A["default"]
        low = F.conv2d(_dropped(self, x), down, None, first.stride, first.padding, first.dilation, first.groups)
        total: Tensor = self.base_layer(x) + float(self.scaling["default"]) * F.conv2d(low, up)
        return total


LoRALayers = Sequence[FusedLoRALinear | HalfLoRAConv2d]


def cast_pairs(layers: LoRALayers, dtype: torch.dtype) -> None:
    """Cast the pairs of ``layers`` to ``dtype`` in one flat tensor, for the next forward pass and its backward pass.

    Autocast would cast each matrix with a kernel of its own, and its gradient with another one.
    """
    masters = [matrix for layer in layers for matrix in _pair(layer)]
    casts: Iterable[Tensor] = _FlatCast.apply(dtype, *masters)  # type: ignore[no-untyped-call]
    matrices = iter(casts)
    for layer in layers:
        layer.cast_pair = next(matrices), next(matrices)


def drop_cast_pairs(layers: LoRALayers) -> None:
    """Free the memory of the cast pairs of ``layers``."""
    for layer in layers:
        layer.cast_pair = None


class _FlatCast(torch.autograd.Function):
    """Casts tensors through one flat copy; their gradients are views of one flat gradient."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return _flat_cast(tensors, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_flat_cast(gradients, ctx.dtype)


def _flat_cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(dtype)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _is_plain(layer: Any) -> bool:
    """Whether only one pair is active; DoRA and other variants use other formulas, and lora_bias adds a term."""
    is_active = layer.active_adapters == ["default"] and not (layer.disable_adapters or layer.merged)
    return is_active and not layer.lora_variant and not layer.lora_bias["default"]


def _dropped(layer: Any, x: Tensor) -> Tensor:
    dropout = layer.lora_dropout["default"]
    dropped: Tensor = x if isinstance(dropout, nn.Identity) else dropout(x)
    return dropped
