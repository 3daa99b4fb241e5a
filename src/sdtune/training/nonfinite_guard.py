"""Gradient clipping, and skipping of non-finite steps without a device synchronization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdtune.torch_compat import foreach_mul_, supports_found_inf

MAX_CONSECUTIVE_OVERFLOWS = 40
"""Consecutive overflows after which a gradient scaler has failed: 40 halvings take any usual scale below 1."""


class NonfiniteGuard:
    """Clips gradients and prevents non-finite optimizer steps; its metrics stay on the device."""

    def __init__(self) -> None:
        self._overflows: Tensor | None = None

    def clip(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        limit: float | None,
        loss: Tensor,
        scaled: bool,
    ) -> dict[str, Tensor]:
        """Clip the global gradient norm, and have the optimizer skip the step if the norm is not finite.

        Args:
            limit: maximum of the global gradient norm; no clipping if None.
            loss: loss of the step, a scalar.
            scaled: whether a gradient scaler (Micikevicius et al. 2018) is active. It skips steps whose gradients
                overflow, which is normal until it has found its scale. Then only a non-finite loss or
                :data:`MAX_CONSECUTIVE_OVERFLOWS` consecutive overflows are a failure.

        Returns:
            Scalar tensors: ``grad_norm``, and ``finite``, False if the run must fail.
        """
        norm = nn.utils.clip_grad_norm_(parameters, limit or float("inf")).detach()
        if not scaled:
            return {"grad_norm": norm, "finite": skip_if_not_finite(optimizer, parameters, norm)}
        previous = torch.zeros_like(norm) if self._overflows is None else self._overflows
        self._overflows = torch.where(torch.isfinite(norm), 0.0, previous + 1)
        return {"grad_norm": norm, "finite": torch.isfinite(loss) & (self._overflows < MAX_CONSECUTIVE_OVERFLOWS)}


def skip_if_not_finite(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], norm: Tensor) -> Tensor:
    """Have ``optimizer`` skip this step if the gradient norm is not finite.

    Fused torch optimizers accept a ``found_inf`` flag and leave weights and state unchanged, bit for bit. Other
    optimizers get zero gradients in that step: momentum can still change the weights, but never to a non-finite value.

    Args:
        norm: global norm of the gradients, scalar.

    Returns:
        Whether ``norm`` is finite, as a bool tensor on the device.
    """
    finite = torch.isfinite(norm)
    if supports_found_inf(optimizer):
        optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        return finite
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        gradient.nan_to_num_(0.0, 0.0, 0.0)
    foreach_mul_(gradients, finite.to(gradients[0].dtype))
    return finite
