"""ControlNet residuals, which are added to the activations of a UNet (Zhang et al. 2023, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor


@dataclass(frozen=True)
class Residuals:
    """Residuals for the UNet's skip connections, outermost first, and for the output of its middle block."""

    skips: tuple[Tensor, ...]
    middle: Tensor

    def __add__(self, other: Residuals) -> Residuals:
        skips = tuple(a + b for a, b in zip(self.skips, other.skips, strict=True))
        return Residuals(skips, self.middle + other.middle)


@dataclass(frozen=True)
class ControlNetWithStrength:
    """A ControlNet for sampling, with its strength."""

    model: ControlNetModel
    strength: float


def cast_conditions(conditions: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Cast ``conditions`` to ``dtype``, except the sizes in pixels, which half precision would round."""
    return {
        name: value
        if name == "time_ids"
        else cast_conditions(value, dtype)
        if isinstance(value, dict)
        else value.to(dtype)
        for name, value in conditions.items()
    }


def residuals(
    model: ControlNetModel,
    noisy: Tensor,
    timesteps: Tensor,
    conditions: dict[str, Any],
    maps: Tensor,
    strength: float = 1.0,
) -> Residuals:
    """Residuals of one ControlNet for ``maps``, float32 [B, 3, H, W] in [0, 1], at the size of the image."""
    dtype = model.conv_in.weight.dtype
    skips, middle = model(
        noisy.to(dtype),
        timesteps,
        controlnet_cond=maps.to(dtype),
        conditioning_scale=strength,
        return_dict=False,
        **cast_conditions(conditions, dtype),
    )
    return Residuals(tuple(skips), middle)


def skip_connection_count(unet: UNet2DConditionModel) -> int:
    """Number of skip connections of ``unet``; diffusers silently ignores surplus or missing residuals."""
    return 1 + sum(len(block.resnets) + len(block.downsamplers or ()) for block in unet.down_blocks)
