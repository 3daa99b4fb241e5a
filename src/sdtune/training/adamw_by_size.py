"""AdamW that uses 8-bit optimizer states only if many parameters are trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from sdtune.errors import UserError

LARGE = 100_000_000
"""Number of trained parameters from which the states have 8 bits: 0.75 GiB of float32 moments.

A UNet, a ControlNet and a text encoder have more; the pairs of a LoRA have less at usual ranks.
"""


class AdamWBySize:
    """Creates AdamW for parameter groups: with 8-bit states for at least :data:`LARGE` parameters, else torch's.

    Args:
        lr: learning rate.
        betas: decay rates of the two moment estimates.
        weight_decay: decoupled weight decay.
        eps: term that is added to the denominator of the update.
        fused: use torch's fused kernel for float32 states.
    """

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
        fused: bool = True,
    ) -> None:
        self._fused = fused
        self._arguments: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "eps": eps}

    @staticmethod
    def check_installed() -> None:
        """Raise UserError if bitsandbytes, which 8-bit states need, is not installed."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "8-bit AdamW needs bitsandbytes, which is not installed",
                key="optimizer",
                remedy="install 'sdtune[optimizers]', or set optimizer=adamw",
            )

    def __call__(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of ``groups``; raises UserError as :meth:`check_installed`."""
        if sum(parameter.numel() for group in groups for parameter in group["params"]) < LARGE:
            return torch.optim.AdamW(groups, fused=self._fused, **self._arguments)
        self.check_installed()
        from sdtune.training.adamw8bit import AdamW8bit

        return AdamW8bit(groups, **self._arguments)  # type: ignore[no-untyped-call]
