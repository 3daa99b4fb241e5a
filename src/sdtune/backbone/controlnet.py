"""Modules beside a denoiser that add to its inputs, such as ControlNets (Zhang et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import ControlNetModel
from torch import Tensor

AddedInputs = dict[str, Tensor | tuple[Tensor, ...]]
"""Arguments of a denoiser that modules beside it compute, such as the residuals of ControlNets."""


class Conditioner(Protocol):
    """A module beside a denoiser: it computes additional inputs of the denoiser from one condition of a request."""

    @property
    def name(self) -> str:
        """Name of the condition, such as ``control``."""

    def added_inputs(
        self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Any], condition: Tensor
    ) -> AddedInputs:
        """Additional inputs of the denoiser.

        Args:
            noisy: noisy latents [B, C, h, w].
            timesteps: [B] or without dimensions.
            conditions: arguments of :meth:`sdtune.backbone.backbone.Backbone.conditions`.
            condition: the condition, such as control maps, float32 [B, 3, H, W] in [0, 1].
        """


def sum_of(first: AddedInputs, second: AddedInputs) -> AddedInputs:
    """Sum of the inputs that two modules add."""
    return {name: _sum(value, second[name]) for name, value in first.items()}


def _sum(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return first + second
    return tuple(a + b for a, b in zip(first, second, strict=True))


@dataclass(frozen=True)
class ControlNetWithStrength:
    """A ControlNet for sampling, with its strength; a :class:`Conditioner`."""

    name: str
    model: ControlNetModel
    strength: float

    def added_inputs(
        self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Any], condition: Tensor
    ) -> AddedInputs:
        return residuals(self.model, noisy, timesteps, conditions, condition, self.strength)


def cast_conditions(conditions: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Cast ``conditions`` to ``dtype``, except the sizes in pixels, which half precision would round."""
    return {
        name: value
        if name == "time_ids"
        else cast_conditions(value, dtype)
        if isinstance(value, dict)
        else value.to(dtype)
        if isinstance(value, Tensor)
        else tuple(part.to(dtype) for part in value)
        for name, value in conditions.items()
    }


def residuals(
    model: ControlNetModel,
    noisy: Tensor,
    timesteps: Tensor,
    conditions: Mapping[str, Any],
    maps: Tensor,
    strength: float = 1.0,
) -> AddedInputs:
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
    return {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}


def skip_connection_count(unet: Any) -> int:
    """Number of skip connections of ``unet``; diffusers silently ignores surplus or missing residuals."""
    return 1 + sum(len(block.resnets) + len(block.downsamplers or ()) for block in unet.down_blocks)
