"""Stable Diffusion 3 and 3.5: a multimodal diffusion transformer with three text encoders."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdtune.backbone.families.base import VAE, Family, LoRAProjection, LoRATarget
from sdtune.backbone.families.unet import PREFIX
from sdtune.backbone.vocabulary import END
from sdtune.formats.kohya_lora import ModelNames
from sdtune.formats.kohya_names import KohyaModule, KohyaTable, plain_modules, underscored
from sdtune.formats.original import ComponentLayout, FileLayout
from sdtune.formats.original.clip import same_entries, with_text_model
from sdtune.formats.original.mmdit import mmdit_entries

_IGNORED = re.compile(
    r"model_ema\..*|first_stage_model\.loss\..*|.*position_ids|.*spiece_model|text_encoders\.\w+\.(transformer\.)?logit_scale"
)
_LORA_LAYER = re.compile(
    r"transformer_blocks\.\d+\.((?P<attention>attn2?)\.(?P<layer>to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2))"
)
_PROJECTIONS: dict[str, LoRAProjection] = {
    "to_q": "q",
    "add_q_proj": "q",
    "to_k": "k",
    "add_k_proj": "k",
    "to_v": "v",
    "add_v_proj": "v",
    "to_out.0": "out",
    "to_add_out": "out",
}
_LORA_HINTS = (
    (
        r"^unet\.|^lora_unet_(down|mid|up|input|middle|output)_",
        "use a backbone with a UNet, such as backbone=sd15 or backbone=sdxl",
    ),
    (r"attn2", "use backbone=sd35_medium"),
    (r"blocks[._](2[4-9]|3\d)[._]", "use backbone=sd35_large"),
)
"""Remedies for LoRA files of other models."""
_LORA_PREFIXES = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}


def _identity(config: Mapping[str, Any]) -> dict[str, Tensor]:
    # The pooled text embedding of the first encoder is not projected (Stability-AI/sd3.5, sd3_infer.py).
    return {"text_projection.weight": torch.eye(int(config["hidden_size"]))}


def _usual_t5_name(key: str) -> str:
    """The first of the two names of T5's token table."""
    return "shared.weight" if key == "encoder.embed_tokens.weight" else key


def _second_table_name(originals: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    # diffusers needs the token table of T5 under both names.
    return {"encoder.embed_tokens.weight": originals["shared.weight"].clone()}


_CLIP_L, _CLIP_G, _T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))

LAYOUT = FileLayout(
    components={
        "transformer": ComponentLayout(PREFIX, mmdit_entries),
        "vae": VAE,
        "text_encoder": ComponentLayout(_CLIP_L, same_entries, usual_name=with_text_model, implied=_identity),
        "text_encoder_2": ComponentLayout(_CLIP_G, same_entries, usual_name=with_text_model),
        "text_encoder_3": ComponentLayout(
            _T5, same_entries, usual_name=_usual_t5_name, placeholders=_second_table_name
        ),
    },
    optional=("vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    is_ignored=lambda key: _IGNORED.fullmatch(key) is not None,
    has_markers=False,
    # kohya's scripts write "epsilon" for these models too.
    predictions={"flow": "flow_prediction", "epsilon": "flow_prediction"},
)
"""FileLayout of single files; the encoders have their transformers names."""


@dataclass(frozen=True)
class SD3Family(Family):
    """A family with an SD3Transformer2DModel.

    Attributes:
        has_qk_norm: whether attention normalizes queries and keys.
        has_dual_attention: whether blocks have a second attention, of the image tokens alone.
        lora_version: kohya's name of the model.
    """

    denoiser: str = field(default="transformer", init=False)
    blocks: tuple[str, ...] = field(default=("transformer_blocks.",), init=False)
    pads: Mapping[str, str | None] = field(
        default_factory=lambda: {"text_encoder": END, "text_encoder_2": "!", "text_encoder_3": None}, init=False
    )
    layout: FileLayout = field(default=LAYOUT, init=False)
    has_qk_norm: bool
    has_dual_attention: bool
    lora_version: str

    def model_classes(self) -> dict[str, Any]:
        from diffusers import AutoencoderKL, SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        return {
            "transformer": SD3Transformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
            "text_encoder_3": T5EncoderModel,
        }

    def is_in(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        block = f"{PREFIX}joint_blocks.0.x_block"
        return (
            f"{block}.attn.qkv.weight" in shapes
            and (f"{block}.attn.ln_k.weight" in shapes) == self.has_qk_norm
            and (f"{block}.attn2.qkv.weight" in shapes) == self.has_dual_attention
        )

    def has_config(self, transformer: Mapping[str, Any]) -> bool:
        """Whether a transformer with this config belongs to the family."""
        if transformer.get("_class_name") != "SD3Transformer2DModel":
            return False
        has_norm, has_dual = transformer.get("qk_norm") is not None, bool(transformer.get("dual_attention_layers"))
        return (has_norm, has_dual) == (self.has_qk_norm, self.has_dual_attention)

    def usual_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` with the prefix of the denoiser, which files of the transformer alone omit."""
        if not any(key.startswith("joint_blocks.") for key in tensors):
            return dict(tensors)
        others = tuple(component.prefix for component in self.layout.components.values())
        return {key if key.startswith(others) else f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}

    def lora_layer(self, name: str) -> tuple[LoRATarget, LoRAProjection | None] | None:
        match = _LORA_LAYER.fullmatch(name)
        if match is None:
            return None
        if match["attention"] is None:
            return "feed_forward", None
        return ("self_attention" if match["attention"] == "attn2" else "joint_attention"), _PROJECTIONS[match["layer"]]

    def lora_names(self, prediction_type: str) -> ModelNames:
        return ModelNames(self.architecture, "diffusers", self.lora_version)

    def kohya_table(self, modules: Collection[str], denoiser: Mapping[str, Any]) -> KohyaTable:
        paths = set(modules)
        named: dict[str, KohyaModule] = {}
        for entry in mmdit_entries((), denoiser):
            joined = tuple(f"transformer.{name.removesuffix('.weight')}" for name in entry.names)
            if entry.original.endswith(".weight") and not paths.isdisjoint(joined):
                name = underscored("lora_unet_", entry.original.removesuffix(".weight"))
                named[name] = KohyaModule(joined, halves_swapped=entry.change == "halves_swapped")
        in_transformer = {path for path in paths if path.startswith("transformer.")}
        named |= plain_modules(paths - in_transformer, _LORA_PREFIXES)
        # OneTrainer's older files have the names of diffusers.
        return KohyaTable(named, plain_modules(in_transformer, {"transformer": "lora_transformer_"}), _LORA_HINTS)


SD3_MEDIUM = SD3Family(
    name="sd3_medium",
    title="SD 3 medium",
    option="backbone=sd3_medium",
    guidance=5.0,
    configs="sd3_medium",
    architecture="stable-diffusion-3-medium",
    lora_targets=("joint_attention", "feed_forward"),
    default_targets=("joint_attention",),
    has_qk_norm=False,
    has_dual_attention=False,
    lora_version="medium",
)
SD35_MEDIUM = SD3Family(
    name="sd35_medium",
    title="SD 3.5 medium",
    option="backbone=sd35_medium",
    guidance=5.0,
    configs="sd35_medium",
    architecture="stable-diffusion-3-5-medium",
    lora_targets=("joint_attention", "self_attention", "feed_forward"),
    default_targets=("joint_attention", "self_attention"),
    has_qk_norm=True,
    has_dual_attention=True,
    lora_version="5-medium",
)
SD35_LARGE = SD3Family(
    name="sd35_large",
    title="SD 3.5 large",
    option="backbone=sd35_large",
    guidance=4.5,
    configs="sd35_large",
    architecture="stable-diffusion-3-5-large",
    lora_targets=("joint_attention", "feed_forward"),
    default_targets=("joint_attention",),
    has_qk_norm=True,
    has_dual_attention=False,
    lora_version="5-large",
)
