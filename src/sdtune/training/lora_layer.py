"""LoRA linear layer for peft with a faster forward pass for a single adapter."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class FusedLoRALinear(Linear):  # type: ignore[misc]
    """LoRA linear layer: W x + scale B (A x), with the last product and the sum in one kernel (Hu et al. 2021, eq. 3).

    All other cases (several adapters, merged weights, DoRA) use peft's forward. It multiplies and adds in separate
    kernels, and casts its input to the pair's dtype: under autocast a copy to float32, which autocast casts back.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output [..., out] for ``x`` [..., in]."""
        down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
        is_plain = self.active_adapters == ["default"] and not (self.disable_adapters or self.merged or args or kwargs)
        # DoRA and other variants use other formulas, and lora_bias adds a term.
        is_plain = is_plain and not self.lora_variant and not self.lora_bias["default"]
        # Without autocast, input and LoRA matrices need the same dtype. The meta device uses the autocast of the CPU:
        # see hardware.precision.autocast.
        autocast = torch.is_autocast_enabled("cpu" if x.is_meta else x.device.type)
        if not is_plain or not (autocast or x.dtype == down.dtype):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        base = self.base_layer(x)
        dropout = self.lora_dropout["default"]
        low = F.linear(x if isinstance(dropout, nn.Identity) else dropout(x), down)
        scale = float(self.scaling["default"])
        total = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scale)
        return total.view_as(base).to(base.dtype)
