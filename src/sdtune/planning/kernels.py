"""Emulation of autocast and fused attention on the meta device, which supports neither."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdtune.torch_compat import efficient_attention

_HALF = (F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm, torch.addmm)
_FLOAT = (F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss)


class Kernels(TorchFunctionMode):
    """Mode that emulates autocast to bfloat16 (torch's autocast op reference) and attention without a score matrix.

    Casts happen only while CPU autocast is enabled (:func:`sdtune.hardware.precision.autocast`).

    Args:
        gpu: compute norms, softmax and losses in float32, like CUDA's autocast and unlike the CPU's.
    """

    def __init__(self, gpu: bool) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if func in _HALF or func is F.scaled_dot_product_attention:
                args, kwargs = self._cast(args, kwargs, torch.bfloat16)
            elif self.gpu and func in _FLOAT:
                args, kwargs = self._cast(args, kwargs, torch.float32)
        return _fused(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def _cast(self, args: Any, kwargs: Any, dtype: torch.dtype) -> tuple[Any, Any]:
        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.bfloat16):
                return value
            # Lightning turns autocast's cache off: each use of a weight is a new copy.
            return value.to(dtype)

        return [cast(value) for value in args], {name: cast(value) for name, value in kwargs.items()}


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Efficient attention, which saves q, k, v, the output and one logsumexp per row for backward.

    On the meta device, torch's dispatch would select the unfused implementation.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    out: Tensor = efficient_attention(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
    return out
