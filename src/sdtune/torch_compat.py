"""The private names of torch that sdtune uses, and no others."""

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
    "set_takes_found_inf",
    "storage_key",
    "takes_found_inf",
    "tree_leaves",
]

foreach_copy_, foreach_lerp_ = torch._foreach_copy_, torch._foreach_lerp_
foreach_mul, foreach_mul_ = torch._foreach_mul, torch._foreach_mul_
"""One kernel for many tensors."""

efficient_attention = torch.ops.aten._scaled_dot_product_efficient_attention


def storage_key(tensor: Tensor) -> int:
    """Names the storage of ``tensor`` while it lives, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def operator_of(overload: Any) -> Any:
    """The operator that ``overload``, of a dispatched call, is one of."""
    return overload._overloadpacket


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``optimizer`` reads ``found_inf`` and ``grad_scale``, as torch's fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_takes_found_inf(optimizer: torch.optim.Optimizer, value: bool) -> None:
    """Have torch's gradient scaler treat ``optimizer`` as one that does, or does not."""
    optimizer._step_supports_amp_scaling = value  # type: ignore[attr-defined]
