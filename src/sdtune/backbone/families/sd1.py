"""Stable Diffusion 1.x."""

from __future__ import annotations

from dataclasses import replace

from sdtune.backbone.families.unet import SDXL_LORA, UNetFamily, clip_layout, unet_layout
from sdtune.backbone.vocabulary import END
from sdtune.formats.kohya_lora import ModelNames


class _SD1(UNetFamily):
    def lora_names(self, prediction_type: str) -> ModelNames:
        names = super().lora_names(prediction_type)
        return replace(names, version=f"{names.version}_v") if prediction_type == "v_prediction" else names


SD1 = _SD1(
    name="sd1",
    title="SD 1.x",
    option="backbone=sd15",
    guidance=7.5,
    configs="sd15",
    pads={"text_encoder": END},
    layout=unet_layout({"text_encoder": clip_layout("cond_stage_model.transformer.")}, has_markers=True),
    architecture="stable-diffusion-v1",
    lora_prefixes={"unet": "lora_unet_", "text_encoder": "lora_te_"},
    lora_version="sd_v1",
    lora_hints=(SDXL_LORA,),
)
