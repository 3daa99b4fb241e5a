"""What SD 1.x, SD 2.x and SDXL share: a UNet, and the original layout of CompVis."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdtune.backbone.families.base import VAE, Family, LoRAProjection, LoRATarget
from sdtune.errors import UserError
from sdtune.formats.kohya_lora import ModelNames
from sdtune.formats.kohya_names import KohyaModule, KohyaTable, plain_modules, underscored
from sdtune.formats.original import ComponentLayout, FileLayout
from sdtune.formats.original.clip import is_unused_in_open_clip, open_clip_entries, same_entries, with_text_model
from sdtune.formats.original.names import unet_entries
from sdtune.formats.original.table import original_names

PREFIX = "model.diffusion_model."
"""Key prefix of the denoiser in single files."""

REFINER = "conditioner.embedders.0.model."
"""Key prefix of the text encoder of the SDXL refiner, and of SD 2.1 Turbo, whose UNet has no size conditioning."""

GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"
"""ModelSpec's implementation with the module names of the original layout."""

SDXL_LORA = (
    r"text_encoder_2|^lora_te2_|^lora_unet_(in|out)put_blocks|attentions\.\d+\.transformer_blocks\.9\.",
    "use an SDXL backbone, such as backbone=sdxl",
)
"""Names that only a LoRA of SDXL has, and the remedy."""
SD3_LORA = (
    r"joint_blocks|^transformer\.|^lora_transformer_",
    "use the Stable Diffusion 3 of its training, such as backbone=sd35_medium",
)
"""Names that only a LoRA of SD 3 has, and the remedy."""

_UNUSED_OF_FIRST_ENCODER = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?(logit_scale|text_projection(\.weight)?)"
)
"""Keys that some programs save with the text encoder of SD 1.x and the first one of SDXL, which have no projection."""
_IGNORED_PREFIXES = ("model_ema.", "first_stage_model.loss.", "denoiser.", "embedding_manager.")
_BUFFERS_AND_MARKERS = (
    "betas",
    "alphas_",
    "sqrt_",
    "log_one_minus_",
    "posterior_",
    "logvar",
    "lvlb_weights",
    "model_ema",
    "v_pred",
    "ztsnr",
    "edm_",
    "global_step",
)


def is_ignored(key: str) -> bool:
    """Whether ``key`` of a single file is not part of the model."""
    is_unused = key.endswith("position_ids") or _UNUSED_OF_FIRST_ENCODER.fullmatch(key) is not None
    return is_unused or key.startswith((*_IGNORED_PREFIXES, *_BUFFERS_AND_MARKERS))


def clip_layout(prefix: str) -> ComponentLayout:
    """A text encoder with transformers names."""
    return ComponentLayout(prefix, same_entries, usual_name=with_text_model, placeholders=_position_ids)


def _position_ids(originals: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    # Older transformers saved this buffer, and strict loaders require it.
    return {"text_model.embeddings.position_ids": torch.arange(int(config["max_position_embeddings"]))[None]}


Placeholders = Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]


def open_clip_layout(prefix: str, placeholders: Placeholders) -> ComponentLayout:
    """A text encoder with OpenCLIP names."""
    return ComponentLayout(prefix, open_clip_entries, is_unused=is_unused_in_open_clip, placeholders=placeholders)


def unet_layout(text_encoders: Mapping[str, ComponentLayout], has_markers: bool) -> FileLayout:
    """FileLayout of a single file with a UNet and these text encoders."""
    return FileLayout(
        components={"unet": ComponentLayout(PREFIX, unet_entries), "vae": VAE, **text_encoders},
        optional=("vae",),
        is_ignored=is_ignored,
        has_markers=has_markers,
        predictions={"v": "v_prediction", "epsilon": "epsilon", "flow": "flow_prediction"},
    )


_PROJECTIONS: dict[LoRAProjection, str] = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out")


@dataclass(frozen=True)
class UNetFamily(Family):
    """A family with a UNet.

    Attributes:
        lora_prefixes: prefix of kohya's module names of each component.
        has_original_lora_names: whether kohya names the UNet's modules as in the original layout. Some trainers use the
            names of diffusers, which are read as well.
        lora_hints: remedies for LoRA files of other UNets.
        lora_version: kohya's ``ss_base_model_version`` for a model that predicts noise.
    """

    denoiser: str = field(default="unet", init=False)
    blocks: tuple[str, ...] = field(default=("down_", "mid_", "up_"), init=False)
    lora_targets: tuple[LoRATarget, ...] = field(
        default=("cross_attention", "self_attention", "feed_forward", "convolutions"), init=False
    )
    default_targets: tuple[LoRATarget, ...] = field(default=("cross_attention", "self_attention"), init=False)
    lora_prefixes: Mapping[str, str]
    lora_version: str
    has_original_lora_names: bool = False
    lora_hints: Sequence[tuple[str, str]] = ()

    def model_classes(self) -> dict[str, Any]:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        classes = {
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
        }
        return {name: classes[name] for name in self.components}

    def is_in(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        prefix = self.layout.components[self.text_encoders[-1]].prefix
        return any(key.startswith(prefix) for key in shapes)

    def lora_layer(self, name: str) -> tuple[LoRATarget, LoRAProjection | None] | None:
        if not name.startswith(self.blocks):
            return None
        if ".attn1." in name or ".attn2." in name:
            projection = next((key for key, end in _PROJECTIONS.items() if name.endswith(end)), None)
            target: LoRATarget = "self_attention" if ".attn1." in name else "cross_attention"
            return (target, projection) if projection is not None else None
        if ".ff." in name:
            return "feed_forward", None
        return ("convolutions", None) if name.rpartition(".")[2] in _CONVOLUTIONS else None

    def lora_names(self, prediction_type: str) -> ModelNames:
        implementation = GENERATIVE_MODELS if self.has_original_lora_names else "diffusers"
        return ModelNames(self.architecture, implementation, self.lora_version)

    def kohya_table(self, modules: Collection[str], denoiser: Mapping[str, Any]) -> KohyaTable:
        diffusers_names = plain_modules(modules, self.lora_prefixes)
        hints = (SD3_LORA, *self.lora_hints)  # both have a second text encoder
        if not self.has_original_lora_names:
            return KohyaTable(diffusers_names, hints=hints)
        unet = {module for module in modules if module.startswith("unet.")}
        entries = unet_entries([f"{path.removeprefix('unet.')}.weight" for path in unet], denoiser)
        names = {
            underscored(self.lora_prefixes["unet"], original.removesuffix(".weight")): KohyaModule(
                (f"unet.{name.removesuffix('.weight')}",)
            )
            for name, original in original_names(entries).items()
        }
        names |= plain_modules(set(modules) - unet, self.lora_prefixes)
        return KohyaTable(names, diffusers_names, hints)


def check_unet_file(shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that a single file with these tensors contains a UNet that sdtune can train.

    Raises:
        UserError: it does not; the message states what the file is and continues the file's name.
    """
    first = list(shapes.get(f"{PREFIX}input_blocks.0.0.weight", ()))
    if not first:
        raise UserError(_describe_other_file(shapes))
    if any(key.startswith(REFINER) for key in shapes):
        raise UserError("is the SDXL refiner", remedy="use the SDXL base model")
    if first[1] != 4:
        kind = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth model"}.get(first[1], "unknown")
        raise UserError(
            f"has {first[1]} input channels ({kind})", remedy="use a text-to-image model with 4 input channels"
        )


def _describe_other_file(keys: Collection[str]) -> str:
    if any("lora_" in key or "lora." in key for key in keys):
        return "is a LoRA, not a Stable Diffusion checkpoint; set the base model here and the LoRA in adapters="
    if any(key.startswith(("encoder.", "decoder.")) for key in keys):
        return "contains only a VAE; set a full Stable Diffusion checkpoint here and the VAE in backbone.vae="
    if any(key.startswith(("control_model.", "controlnet_")) for key in keys):
        return "is a ControlNet, not a Stable Diffusion checkpoint; set the base model here"
    if any(key.startswith(("down_blocks.", "conv_in.")) for key in keys):
        return "contains only a diffusers UNet; use the full pipeline folder"
    return (
        "is not a Stable Diffusion 1.x, 2.x or XL checkpoint in the original layout (no model.diffusion_model. tensors)"
    )
