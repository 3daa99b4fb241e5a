"""Quantized storage of frozen weights: fp8, int8 and nf4. Weights are dequantized in each forward and backward pass."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.families import Quantization
from sdtune.backbone.layers import layers
from sdtune.errors import UserError
from sdtune.hardware.precision import autocast_kind

NF4_BLOCK = 64
"""Weights with a common scale in nf4 (Dettmers et al. 2023, section 3)."""

_IN_LAYERS = re.compile(r"\.layers\.|\.block\.")
_IN_NORM = re.compile(r"(^|\.)norm\w*\.")  # adaptive norms of transformers, which diffusers keeps whole too
"""Names inside of the layers of a text encoder: of CLIP and of T5."""

_LARGEST_FP8 = 448.0  # of float8_e4m3fn


class Quantized(nn.Module):
    """Frozen layer with a quantized weight; its base class is a linear layer or a convolution.

    ``weight`` is the dequantized weight, in the dtype of the model. It is computed on each access and not
    stored, so autograd does not keep it for the backward pass. The scales are stored as bytes: a cast of the model to
    another dtype must not round them.
    """

    format: Quantization
    shape: torch.Size
    dtype: torch.dtype
    packed: nn.Parameter
    scales: nn.Parameter
    dense: Tensor | None
    """A weight to use instead, such as one with a merged LoRA."""

    @property
    def weight(self) -> Tensor:
        return self.dequantized(self.dtype) if self.dense is None else self.dense

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The stored weight in ``dtype``."""
        scales = self.scales.view(torch.float32)
        rows = scales.view(-1, *[1] * (len(self.shape) - 1))
        if self.format == "nf4":
            # bitsandbytes has no float64
            values = _unpack_nf4(self.packed, scales, self.shape, dtype if dtype.itemsize <= 4 else torch.float32)
            return values.to(dtype)
        if self.format == "fp8":
            # The scales are powers of two, so that the product is not rounded.
            return self.packed.view(torch.float8_e4m3fn).to(dtype).mul_(rows.to(dtype))
        # One kernel: the product is computed in float32 and rounded once.
        out = torch.empty_like(self.packed, dtype=dtype)
        return torch.mul(self.packed.view(torch.int8), rows, out=out)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        """Move or cast the layer: the packed weight only moves."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.dense = None if self.dense is None else fn(self.dense)
        return self

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        kind = autocast_kind(x.device)
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[override]
    """Linear layer with a quantized weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Output [..., out] for ``x`` [..., in]."""
        x = x.to(self._compute_dtype(x))
        if self.dense is not None:
            return F.linear(x, self.dense.to(x.dtype), _cast(self.bias, x))
        out: Tensor = _Linear.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class QuantizedConv2d(Quantized, nn.Conv2d):  # type: ignore[override]
    """Convolution with a quantized weight."""

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Stride, padding, dilation and groups."""
        return self.stride, self.padding, self.dilation, self.groups

    def forward(self, x: Tensor) -> Tensor:
        """Output [B, out, H', W'] for ``x`` [B, in, H, W]."""
        x = x.to(self._compute_dtype(x))
        if self.dense is not None:
            return F.conv2d(x, self.dense.to(x.dtype), _cast(self.bias, x), *self.geometry)
        out: Tensor = _Conv2d.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class _Linear(torch.autograd.Function):
    """Linear layer. The backward pass dequantizes the weight again, so that autograd stores no dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype), _cast(layer.bias, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


class _Conv2d(torch.autograd.Function):
    """Convolution. The backward pass dequantizes the weight again, so that autograd stores no dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return F.conv2d(x, layer.dequantized(x.dtype), _cast(layer.bias, x), *layer.geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.dequantized(gradient.dtype)
        return conv2d_input(ctx.shape, weight, gradient, *ctx.layer.geometry), None  # type: ignore[no-untyped-call]


def _cast(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def check_quantization(quantization: Quantization | None, trained: Iterable[str]) -> None:
    """Check that frozen weights can be quantized as ``quantization``.

    Args:
        trained: components whose weights are trained.

    Raises:
        UserError: there are such components, or bitsandbytes is not installed.
    """
    if quantization is None:
        return
    if any(trained):
        raise UserError(
            f"got {quantization}, but this method trains the model's weights",
            key="backbone.quantize",
            remedy="remove it, or use method=lora, textual_inversion or controlnet",
        )
    if quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "nf4 needs bitsandbytes, which is not installed",
            key="backbone.quantize",
            remedy="install 'sdtune[optimizers]', or set fp8 or int8",
        )


def quantize(backbone: Backbone, quantization: Quantization | None) -> None:
    """Quantize the frozen layers in the denoiser's blocks and in the text encoders' layers, in place; None: do nothing.

    ``fp8`` also quantizes convolutions. First and last layers, embeddings and norms stay as they are. The weights are
    first rounded to bfloat16, so that the result does not depend on whether the model was loaded in float32.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    check_quantization(quantization, ())
    if quantization is None:
        return
    for component, name, layer in list(layers(backbone)):
        inside = name.startswith(backbone.facts.family.blocks) if component == "denoiser" else _IN_LAYERS.search(name)
        if inside and not _IN_NORM.search(name) and _is_quantizable(layer, quantization):
            _quantize_layer(layer, quantization)


def _is_quantizable(module: nn.Module, quantization: Quantization) -> bool:
    kinds = (nn.Linear, nn.Conv2d) if quantization == "fp8" else (nn.Linear,)
    if isinstance(module, Quantized) or not isinstance(module, kinds) or module.weight.requires_grad:
        return False
    return getattr(module, "padding_mode", "zeros") == "zeros"


@torch.no_grad()
def _quantize_layer(layer: Any, quantization: Quantization) -> None:
    weight = layer.weight.data
    packed, scales = _PACKERS[quantization](weight.bfloat16().float().contiguous())
    del layer.weight
    layer.__class__ = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d
    layer.format, layer.shape, layer.dtype, layer.dense = quantization, weight.shape, weight.dtype, None
    layer.packed = nn.Parameter(packed.view(torch.uint8), requires_grad=False)
    layer.scales = nn.Parameter(scales.flatten().view(torch.uint8), requires_grad=False)


def _rows(weight: Tensor) -> Tensor:
    """Largest absolute value of each output row, in a shape that multiplies ``weight``."""
    return weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True).clamp_min(1e-12)


def _pack_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by a power of two, then cast. Without it, most weights of a UNet would be subnormal in e4m3."""
    scales = torch.exp2(torch.ceil(torch.log2(_rows(weight) / _LARGEST_FP8)))
    return (weight / scales).to(torch.float8_e4m3fn), scales


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per row, as for the weights of LLM.int8 (Dettmers et al. 2022b, section 3)."""
    scales = _rows(weight) / 127
    return torch.round(weight / scales).to(torch.int8), scales


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit NormalFloat (Dettmers et al. 2023), two weights per byte."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax


def _unpack_nf4(packed: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    # A block can end in the middle of a row; given rows, the CPU kernel of bitsandbytes 0.50 gets such blocks wrong.
    flat = torch.Size([shape.numel()])
    state = QuantState(scales, flat, None, NF4_BLOCK, "nf4", dtype)  # type: ignore[no-untyped-call]
    values: Tensor = dequantize_4bit(packed, state)
    return values.view(shape)


_PACKERS = {"fp8": _pack_fp8, "int8": _pack_int8, "nf4": _pack_nf4}
