"""peft's LoRA linear layer with a faster path for one active pair."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class Site(Linear):  # type: ignore[misc]
    """W x + scale B (A x), the last product and the sum in one kernel (Hu et al. 2021, eq. 3).

    peft's own forward, which everything else goes to, multiplies and adds apart and turns its input to the pair's
    type: under autocast that is a copy to float32 that autocast turns back.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., out] from [..., in]."""
        down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
        alone = self.active_adapters == ["default"] and not (self.disable_adapters or self.merged or args or kwargs)
        # DoRA and its like compute otherwise, and a bias is added.
        alone = alone and not self.lora_variant and not self.lora_bias["default"]
        # Without autocast a base in half precision stays in it; hardware.precision.autocast uses the CPU's for meta.
        cast = torch.is_autocast_enabled("cpu" if x.is_meta else x.device.type)
        if not alone or not (cast or x.dtype == down.dtype):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        base = self.base_layer(x)
        dropout = self.lora_dropout["default"]
        low = F.linear(x if isinstance(dropout, nn.Identity) else dropout(x), down)
        scale = float(self.scaling["default"])
        both = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scale)
        return both.view_as(base).to(base.dtype)
