"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdtune.backbone.families.unet import UNetFamily, clip_layout, open_clip_layout, unet_layout
from sdtune.backbone.vocabulary import END


def _placeholders(originals: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"logit_scale": torch.tensor(4.6055)}  # CLIP's value after training: ln 100, where it is clipped


SDXL = UNetFamily(
    name="sdxl",
    title="SDXL",
    option="backbone=sdxl",
    guidance=5.0,
    configs="sdxl",
    pads={"text_encoder": END, "text_encoder_2": "!"},
    layout=unet_layout(
        {
            "text_encoder": clip_layout("conditioner.embedders.0.transformer."),
            "text_encoder_2": open_clip_layout("conditioner.embedders.1.model.", _placeholders),
        },
        has_markers=True,
    ),
    architecture="stable-diffusion-xl-v1-base",
    lora_prefixes={"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    lora_version="sdxl_base_v1-0",
    has_original_lora_names=True,
)
