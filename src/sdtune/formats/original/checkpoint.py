"""Split a single-file Stable Diffusion checkpoint into the models of a diffusers pipeline, and join them again."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdtune.errors import UserError
from sdtune.formats.original import clip, names

Family = Literal["sd1", "sd2", "sdxl"]
Components = dict[str, dict[str, Tensor]]
"""Tensors of each component by diffusers or transformers name (text encoders: with ``text_model.`` prefix)."""

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT: dict[str, dict[str, str]] = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
"""Key prefixes of the text encoders; a prefix that ends in ``model.`` means OpenCLIP names."""

_REFINER = "conditioner.embedders.0.model."
"""Key prefix of the text encoder of the SDXL refiner, and of SD 2.1 Turbo, whose UNet has no size conditioning."""

_SIZE_CONDITIONING = f"{UNET}label_emb.0.0.weight"
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


@dataclass(frozen=True)
class Models:
    """Family and configs that determine the names: diffusers (UNet, VAE) and transformers (text encoders) configs."""

    family: Family
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any] | None = None

    def text(self, component: str) -> Mapping[str, Any]:
        config = self.text_encoder if component == "text_encoder" else self.text_encoder_2
        assert config is not None
        return config


def with_usual_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with the names of other SD 2.x files if it is SD 2.1 Turbo, which has the refiner's prefix."""
    if _SIZE_CONDITIONING in tensors:
        return dict(tensors)
    prefix = TEXT["sd2"]["text_encoder"]
    return {prefix + key.removeprefix(_REFINER) if key.startswith(_REFINER) else key: t for key, t in tensors.items()}


def detect(shapes: Mapping[str, Collection[int]]) -> Family:
    """Detect the family of a checkpoint from its tensor names and shapes.

    Raises:
        UserError: it is not a Stable Diffusion checkpoint that sdtune can train; the message states what it is.
    """
    first = list(shapes.get(f"{UNET}input_blocks.0.0.weight", ()))
    if not first:
        raise UserError(_describe_other_file(shapes))
    if any(key.startswith(_REFINER) for key in shapes):
        raise UserError("is the SDXL refiner", remedy="use the SDXL base model")
    if first[1] != 4:
        kind = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth model"}.get(first[1], "unknown")
        raise UserError(
            f"has {first[1]} input channels ({kind})", remedy="use a text-to-image model with 4 input channels"
        )
    for family in ("sdxl", "sd2", "sd1"):
        prefix = list(TEXT[family].values())[-1]
        if any(key.startswith(prefix) for key in shapes):
            return family
    raise UserError("contains a UNet without its text encoder", remedy="use a full checkpoint")


_PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon"}
"""Prediction types by their names in ModelSpec."""


def stated_prediction(tensors: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """Prediction type that a checkpoint states: by ComfyUI's marker ``v_pred``, or else by ModelSpec's metadata.

    The marker counts more: kohya's scripts for merging write "epsilon" also for v-prediction models.

    Args:
        tensors: tensor names.
        metadata: header of the file; https://github.com/Stability-AI/ModelSpec.

    Raises:
        UserError: it is an EDM or flow model; the message continues the file's name.
    """
    edm = next((key for key in ("edm_mean", "edm_std", "edm_vpred.sigma_max") if key in tensors), None)
    if edm is not None:
        raise UserError(
            f"is an EDM model (it has {edm}), whose noise sdtune does not train with",
            remedy="use a model with a DDPM noise schedule",
        )
    name = metadata.get("modelspec.prediction_type")
    if name is not None and name not in _PREDICTIONS:
        raise UserError(
            f"states modelspec.prediction_type {name}", remedy=f"sdtune trains models with {' or '.join(_PREDICTIONS)}"
        )
    return "v_prediction" if "v_pred" in tensors else _PREDICTIONS.get(name or "")


def _describe_other_file(shapes: Iterable[str]) -> str:
    keys = list(shapes)
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


def split(tensors: Mapping[str, Tensor], models: Models, wanted: Mapping[str, Collection[str]]) -> Components:
    """Split the ``tensors`` of a single file into components and rename them; omit tensors that training does not need.

    Unexpected tensors keep their original names, so that the caller can report them as surplus. They are those with a
    component's prefix that ``wanted`` does not contain, and all others that are not known to occur in such files.

    Args:
        tensors: tensors by original name.
        models: family and configs of the file.
        wanted: expected tensor names of each component.
    """
    components: Components = {}
    remaining = {key for key in tensors if not _is_ignored(key)}
    table = names.unet_names(wanted["unet"], models.unet)
    components["unet"] = {
        name: tensors[UNET + original] for name, original in table.items() if UNET + original in remaining
    }
    remaining -= {UNET + original for original in table.values()}
    prefixed = {key.removeprefix(VAE): tensors[key] for key in remaining if key.startswith(VAE)}
    components["vae"] = split_vae(prefixed, models.vae, wanted["vae"])
    remaining -= {VAE + key for key in prefixed}
    for component, prefix in TEXT[models.family].items():
        prefixed = {key.removeprefix(prefix): tensors[key] for key in remaining if key.startswith(prefix)}
        if prefix.endswith(".model."):
            layers = int(models.text(component)["num_hidden_layers"])
            projected = component == "text_encoder_2"
            components[component] = clip.from_open_clip(prefixed, layers, projected)
            consumed = (
                clip.expected(layers, projected)
                | {key for key in prefixed if _is_skipped_layer(key, layers)}
                | set(clip.UNUSED)
            )
            consumed |= {"text_projection"}
        else:
            components[component] = {
                _with_text_model(key): t for key, t in prefixed.items() if not key.endswith("position_ids")
            }
            consumed = set(prefixed)
        remaining -= {prefix + key for key in consumed}
    for component, prefix in TEXT[models.family].items():
        components[component] |= {key: tensors[key] for key in remaining if key.startswith(prefix)}
        remaining = {key for key in remaining if not key.startswith(prefix)}
    components["unet"] |= {key: tensors[key] for key in remaining}
    return components


def split_vae(tensors: Mapping[str, Tensor], config: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Tensor]:
    """Rename the ``tensors`` of a VAE from original or diffusers names to diffusers names; keep unknown names."""
    diffusers_names = {original: name for name, original in names.vae_names(wanted, config).items()}
    vae: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = names.modern_vae_key(diffusers_names.get(key, key))
        if not key.startswith("loss."):
            vae[name] = tensor.flatten(1) if names.is_vae_projection(name) and tensor.dim() == 4 else tensor
    return vae


def join(
    components: Components, models: Models, v_prediction: bool = False, zero_snr: bool = False
) -> dict[str, Tensor]:
    """Join all models to one dict of tensors by original name, as in the authors' files.

    Args:
        components: all tensors of all models.
        models: family and configs.
        v_prediction: add the marker ``v_pred`` to SD 1.x and SDXL. ComfyUI reads it from SDXL files; it detects the
            prediction type of SD 2.x from the weights, and assumes epsilon for SD 1.x.
        zero_snr: add the marker ``ztsnr`` for zero terminal SNR to SD 1.x and SDXL.
    """
    joined: dict[str, Tensor] = {}
    for key, original in names.unet_names(components["unet"], models.unet).items():
        joined[UNET + original] = components["unet"][key]
    for key, original in names.vae_names(components["vae"], models.vae).items():
        tensor = components["vae"][key]
        joined[VAE + original] = tensor[:, :, None, None] if names.is_vae_projection(key) else tensor
    for component, prefix in TEXT[models.family].items():
        config, encoder = models.text(component), components[component]
        layers, length = int(config["num_hidden_layers"]), int(config["max_position_embeddings"])
        if not prefix.endswith(".model."):
            joined |= {prefix + key: tensor for key, tensor in encoder.items()}
            # Older transformers saved this buffer, and strict loaders require it.
            joined[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(length)[None]
            continue
        renamed = clip.to_open_clip(encoder, layers)
        if models.family == "sd2":
            renamed |= _unused_sd2(renamed, layers)
        else:
            renamed["logit_scale"] = torch.tensor(4.6055)  # CLIP's value after training: ln 100, where it is clipped
        joined |= {prefix + key: tensor for key, tensor in renamed.items()}
    marks = (("v_pred", v_prediction), ("ztsnr", zero_snr)) if models.family != "sd2" else ()
    return joined | {mark: torch.tensor([]) for mark, on in marks if on}


def _unused_sd2(renamed: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Placeholders for tensors that OpenCLIP loaders require and SD 2.x never uses: last layer, projection, scale.

    A pipeline folder does not contain these tensors. kohya's tools write placeholders as well.
    """
    last, width = f"transformer.resblocks.{layers - 1}.", renamed["ln_final.weight"].shape[0]
    copies = {
        key.replace(last, f"transformer.resblocks.{layers}."): tensor.clone()
        for key, tensor in renamed.items()
        if key.startswith(last)
    }
    dtype = renamed["ln_final.weight"].dtype
    return {**copies, "text_projection": torch.ones(width, width, dtype=dtype), "logit_scale": torch.tensor(1.0)}


def _is_ignored(key: str) -> bool:
    is_unused = key.endswith("position_ids") or _UNUSED_OF_FIRST_ENCODER.fullmatch(key) is not None
    return is_unused or key.startswith((*_IGNORED_PREFIXES, *_BUFFERS_AND_MARKERS))


def _is_skipped_layer(key: str, layers: int) -> bool:
    parts = key.split(".")
    return key.startswith("transformer.resblocks.") and parts[2].isdigit() and int(parts[2]) >= layers


def _with_text_model(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"
