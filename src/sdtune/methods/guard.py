"""A step that is not finite must not reach the weights, and finding out must not wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def skip_if_not_finite(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], norm: Tensor) -> Tensor:
    """Have ``optimizer`` pass over this step if the gradients' ``norm`` is not finite; returns the flag, on the device.

    torch's fused optimizers take a ``found_inf`` flag and leave weights and state untouched, to the bit. Others get
    zero gradients in that step; with momentum they still move a little, but never to a value that is not finite.
    """
    finite = torch.isfinite(norm)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        return finite
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        gradient.nan_to_num_(0.0, 0.0, 0.0)
    torch._foreach_mul_(gradients, finite.to(gradients[0].dtype))
    return finite
