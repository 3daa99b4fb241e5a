"""AdamW with 8-bit optimizer states, without waiting for the device. Imports bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit as BitsAndBytesAdamW8bit  # type: ignore[attr-defined]


class AdamW8bit(BitsAndBytesAdamW8bit):
    """AdamW with 8-bit moments (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization").

    The step of bitsandbytes waits for the device after each tensor. Only paged optimizers need that.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Queue the update of all parameters; returns the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        optimizer: Any = self  # bitsandbytes has no types
        if not self.initialized:
            optimizer.check_overrides()
            optimizer.to_gpu()
            self.initialized = True
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    optimizer.init_state(group, parameter, group_index, index)
                optimizer.update_step(group, parameter, group_index, index)
        return loss
