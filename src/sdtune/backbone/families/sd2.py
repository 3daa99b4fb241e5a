"""Stable Diffusion 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdtune.backbone.families.unet import PREFIX, REFINER, SDXL_LORA, UNetFamily, open_clip_layout, unet_layout
from sdtune.formats.kohya_lora import ModelNames

_TEXT = "cond_stage_model.model."
_SIZE_CONDITIONING = f"{PREFIX}label_emb.0.0.weight"


class _SD2(UNetFamily):
    def usual_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` with the names of other SD 2.x files if it is SD 2.1 Turbo, which has the refiner's prefix."""
        if _SIZE_CONDITIONING in tensors:
            return dict(tensors)
        return {_TEXT + key.removeprefix(REFINER) if key.startswith(REFINER) else key: t for key, t in tensors.items()}

    def lora_names(self, prediction_type: str) -> ModelNames:
        if prediction_type == "v_prediction":
            return ModelNames("stable-diffusion-v2-768-v", "diffusers", "sd_v2_v", is_v2=True)
        return ModelNames("stable-diffusion-v2-512", "diffusers", "sd_v2", is_v2=True)


def _placeholders(originals: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Placeholders for tensors that OpenCLIP loaders require and SD 2.x never uses: last layer, projection, scale.

    A pipeline folder does not contain these tensors. kohya's tools write placeholders as well.
    """
    layers, norm = int(config["num_hidden_layers"]), originals["ln_final.weight"]
    last = f"transformer.resblocks.{layers - 1}."
    copies = {
        key.replace(last, f"transformer.resblocks.{layers}."): tensor.clone()
        for key, tensor in originals.items()
        if key.startswith(last)
    }
    projection = torch.ones(len(norm), len(norm), dtype=norm.dtype)
    return {**copies, "text_projection": projection, "logit_scale": torch.tensor(1.0)}


SD2 = _SD2(
    name="sd2",
    title="SD 2.x",
    option="backbone=sd21",
    guidance=7.5,
    configs="sd21",
    pads={"text_encoder": "!"},
    # ComfyUI detects the prediction type of SD 2.x from the weights.
    layout=unet_layout({"text_encoder": open_clip_layout(_TEXT, _placeholders)}, has_markers=False),
    architecture="stable-diffusion-v2",
    lora_prefixes={"unet": "lora_unet_", "text_encoder": "lora_te_"},
    lora_version="sd_v2",
    lora_hints=(SDXL_LORA,),
)
