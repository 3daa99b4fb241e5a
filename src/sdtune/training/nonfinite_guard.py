"""Skip steps that are not finite without waiting for the device; gradient clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdtune.torch_compat import foreach_mul_, takes_found_inf

OVERFLOWS = 40
"""So many steps in a row a gradient scaler may pass over: halved as often, any scale that it begins at is below 1."""


class Guard:
    """Clips gradients and keeps steps that are not finite from the weights; its metrics stay on the device."""

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
        """Clip the gradients' joint norm to ``limit``, guard the step, and give the metrics.

        Args:
            scaled: whether a gradient scaler (Micikevicius et al. 2018) looks after the step. It passes over gradients
                that overflow, as they do while it finds its scale; a loss that is not finite is then a failure, and
                gradients that no scale makes finite.
        """
        norm = nn.utils.clip_grad_norm_(parameters, limit or float("inf")).detach()
        if not scaled:
            return {"grad_norm": norm, "finite": skip_if_not_finite(optimizer, parameters, norm)}
        before = torch.zeros_like(norm) if self._overflows is None else self._overflows
        self._overflows = torch.where(torch.isfinite(norm), 0.0, before + 1)
        return {"grad_norm": norm, "finite": torch.isfinite(loss) & (self._overflows < OVERFLOWS)}


def skip_if_not_finite(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], norm: Tensor) -> Tensor:
    """Have ``optimizer`` pass over this step if the gradients' ``norm`` is not finite; returns the flag, on the device.

    torch's fused optimizers take a ``found_inf`` flag and leave weights and state untouched, to the bit. Others get
    zero gradients in that step; with momentum they still move a little, but never to a value that is not finite.
    """
    finite = torch.isfinite(norm)
    if takes_found_inf(optimizer):
        optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        return finite
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        gradient.nan_to_num_(0.0, 0.0, 0.0)
    foreach_mul_(gradients, finite.to(gradients[0].dtype))
    return finite
