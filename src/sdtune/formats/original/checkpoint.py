"""A whole Stable Diffusion as one dict of tensors, split into the models of a diffusers pipeline, and joined again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdtune.errors import UserError
from sdtune.formats.original import clip, names

Family = Literal["sd1", "sd2", "sdxl"]
Components = dict[str, dict[str, Tensor]]
"""Tensors by diffusers' and transformers' names (``text_model.`` before a text encoder's), by component."""

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT: dict[str, dict[str, str]] = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
"""Prefixes of the text encoders' tensors; those that end in ``model.`` have OpenCLIP's names."""

_REFINER = "conditioner.embedders.0.model."
_PASSED_OVER = ("model_ema.", "first_stage_model.loss.", "denoiser.", "embedding_manager.")
_TABLES = (
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


@dataclass(frozen=True)
class Models:
    """The configs by which names are found: diffusers' of UNet and VAE, transformers' of the text encoders."""

    family: Family
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any] | None = None

    def text(self, component: str) -> Mapping[str, Any]:
        config = self.text_encoder if component == "text_encoder" else self.text_encoder_2
        assert config is not None
        return config


def detect(shapes: Mapping[str, Collection[int]]) -> Family:
    """Which Stable Diffusion a file is, from its tensors' names and shapes.

    Raises:
        UserError: it is none, or one that cannot be trained here; the message says what it is.
    """
    first = list(shapes.get(f"{UNET}input_blocks.0.0.weight", ()))
    if not first:
        raise UserError(_what_else(shapes))
    if any(key.startswith(_REFINER) for key in shapes):
        raise UserError("is SDXL's refiner; the base model is what can be fine-tuned")
    if first[1] != 4:
        kind = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth model"}.get(first[1], "another")
        raise UserError(f"takes {first[1]} channels ({kind}); a text-to-image model takes 4")
    for family in ("sdxl", "sd2", "sd1"):
        prefix = list(TEXT[family].values())[-1]
        if any(key.startswith(prefix) for key in shapes):
            return family
    raise UserError("holds a UNet without its text encoder; a whole checkpoint is needed")


def _what_else(shapes: Iterable[str]) -> str:
    keys = list(shapes)
    if any("lora_" in key or "lora." in key for key in keys):
        return "holds a LoRA, no Stable Diffusion; name the base model here and the LoRA in adapters="
    if any(key.startswith(("encoder.", "decoder.")) for key in keys):
        return "holds a VAE alone; name a whole Stable Diffusion here, and the VAE as backbone.vae="
    if any(key.startswith(("control_model.", "controlnet_")) for key in keys):
        return "holds a ControlNet, no Stable Diffusion; name the base model here"
    if any(key.startswith(("down_blocks.", "conv_in.")) for key in keys):
        return "holds a diffusers UNet alone; name the whole pipeline folder"
    return "holds no Stable Diffusion 1.x, 2.x or XL in the original layout (no model.diffusion_model. tensors)"


def split(tensors: Mapping[str, Tensor], models: Models, wanted: Mapping[str, Collection[str]]) -> Components:
    """``tensors`` of a single file by component and name; what training does not need is left out.

    Args:
        tensors: by the original names.
        models: what the file is.
        wanted: the names that each component is to have, by component. A tensor of the models' prefixes that none of
            them asks for is kept under its original name, so that the caller sees it as surplus; so is any other that
            is not known to stand in such files.
    """
    found: Components = {}
    rest = {key for key in tensors if not _known_extra(key)}
    table = names.unet_names(wanted["unet"], models.unet)
    found["unet"] = {ours: tensors[UNET + theirs] for ours, theirs in table.items() if UNET + theirs in rest}
    rest -= {UNET + theirs for theirs in table.values()}
    own = {key.removeprefix(VAE): tensors[key] for key in rest if key.startswith(VAE)}
    found["vae"] = split_vae(own, models.vae, wanted["vae"])
    rest -= {VAE + key for key in own}
    for component, prefix in TEXT[models.family].items():
        own = {key.removeprefix(prefix): tensors[key] for key in rest if key.startswith(prefix)}
        if prefix.endswith(".model."):
            layers = int(models.text(component)["num_hidden_layers"])
            projected = component == "text_encoder_2"
            found[component] = clip.from_open_clip(own, layers, projected)
            used = clip.expected(layers, projected) | {key for key in own if _beyond(key, layers)} | set(clip.UNUSED)
            used |= {"text_projection"}
        else:
            found[component] = {_with_text_model(key): t for key, t in own.items() if not key.endswith("position_ids")}
            used = set(own)
        rest -= {prefix + key for key in used}
    for component, prefix in TEXT[models.family].items():
        found[component] |= {key: tensors[key] for key in rest if key.startswith(prefix)}
        rest = {key for key in rest if not key.startswith(prefix)}
    found["unet"] |= {key: tensors[key] for key in rest}
    return found


def split_vae(tensors: Mapping[str, Tensor], config: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Tensor]:
    """A VAE's ``tensors`` by diffusers' names, from the original layout's or diffusers' own; others keep theirs."""
    theirs_to_ours = {theirs: ours for ours, theirs in names.vae_names(wanted, config).items()}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        ours = names.modern_vae_key(theirs_to_ours.get(key, key))
        if not key.startswith("loss."):
            found[ours] = tensor.flatten(1) if names.is_vae_projection(ours) and tensor.dim() == 4 else tensor
    return found


def join(
    components: Components, models: Models, v_prediction: bool = False, zero_snr: bool = False
) -> dict[str, Tensor]:
    """One dict of tensors by the original names, as the authors' files have it.

    Args:
        components: every tensor of every model.
        models: what they are.
        v_prediction: of SD 1.x and SDXL, mark it with ``v_pred``: ComfyUI looks for it in SDXL files; it tells SD 2.x
            files from their weights, and takes SD 1.x for epsilon.
        zero_snr: mark a schedule of zero terminal SNR with ``ztsnr``.
    """
    made: dict[str, Tensor] = {}
    for key, theirs in names.unet_names(components["unet"], models.unet).items():
        made[UNET + theirs] = components["unet"][key]
    for key, theirs in names.vae_names(components["vae"], models.vae).items():
        tensor = components["vae"][key]
        made[VAE + theirs] = tensor[:, :, None, None] if names.is_vae_projection(key) else tensor
    for component, prefix in TEXT[models.family].items():
        config, own = models.text(component), components[component]
        layers, length = int(config["num_hidden_layers"]), int(config["max_position_embeddings"])
        if not prefix.endswith(".model."):
            made |= {prefix + key: tensor for key, tensor in own.items()}
            # The authors' transformers saved this buffer, and strict loaders look for it.
            made[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(length)[None]
            continue
        renamed = clip.to_open_clip(own, layers)
        if models.family == "sd2":
            renamed |= _unused_sd2(renamed, layers)
        else:
            renamed["logit_scale"] = torch.tensor(4.6055)  # of CLIP's training: ln 100, where it is clipped
        made |= {prefix + key: tensor for key, tensor in renamed.items()}
    marks = (("v_pred", v_prediction), ("ztsnr", zero_snr)) if models.family != "sd2" else ()
    return made | {mark: torch.tensor([]) for mark, on in marks if on}


def _unused_sd2(renamed: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """What OpenCLIP's loaders look for and SD 2.x never uses: its last layer, projection and scale.

    A pipeline folder does not have them, so they are stand-ins, as kohya's tools write them too.
    """
    last, width = f"transformer.resblocks.{layers - 1}.", renamed["ln_final.weight"].shape[0]
    copies = {
        key.replace(last, f"transformer.resblocks.{layers}."): tensor.clone()
        for key, tensor in renamed.items()
        if key.startswith(last)
    }
    dtype = renamed["ln_final.weight"].dtype
    return {**copies, "text_projection": torch.ones(width, width, dtype=dtype), "logit_scale": torch.tensor(1.0)}


def _known_extra(key: str) -> bool:
    return key.startswith((*_PASSED_OVER, *_TABLES)) or key.endswith("position_ids")


def _beyond(key: str, layers: int) -> bool:
    parts = key.split(".")
    return key.startswith("transformer.resblocks.") and parts[2].isdigit() and int(parts[2]) >= layers


def _with_text_model(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"
