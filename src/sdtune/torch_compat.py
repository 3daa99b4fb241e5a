"""All private names of torch that sdtune uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "TorchDispatchMode",
    "efficient_attention",
    "foreach_copy_",
    "foreach_lerp_",
    "foreach_mul",
    "foreach_mul_",
    "operator_of",
    "set_supports_found_inf",
    "storage_key",
    "supports_found_inf",
    "tree_leaves",
]

foreach_copy_, foreach_lerp_ = torch._foreach_copy_, torch._foreach_lerp_
foreach_mul, foreach_mul_ = torch._foreach_mul, torch._foreach_mul_
"""Operations on lists of tensors with one kernel launch."""

efficient_attention = torch.ops.aten._scaled_dot_product_efficient_attention


def storage_key(tensor: Tensor) -> int:
    """Unique id of the storage of ``tensor`` during its lifetime, also on the meta device."""
    return int(tensor.untyped_storage()._cdata)


def operator_of(overload: Any) -> Any:
    """Operator to which ``overload``, the function of a dispatched call, belongs."""
    return overload._overloadpacket


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``optimizer`` reads ``found_inf`` and ``grad_scale``, like torch's fused optimizers."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_supports_found_inf(optimizer: torch.optim.Optimizer, value: bool) -> None:
    """Set whether torch's gradient scaler passes ``found_inf`` and ``grad_scale`` to ``optimizer``."""
    optimizer._step_supports_amp_scaling = value  # type: ignore[attr-defined]
