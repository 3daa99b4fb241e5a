"""Convert a pipeline folder to the original single-file names, independently of the implementation in sdtune.

The rules are those of diffusers' ``scripts/convert_diffusers_to_original_stable_diffusion.py`` and its SDXL variant:
chains of text replacements, where sdtune builds tables from the model configs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

_UNET_ENDS = [
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
    ("label_emb.0.0.", "add_embedding.linear_1."),
    ("label_emb.0.2.", "add_embedding.linear_2."),
]
_RESNET = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
]


def original_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors that the conversion script writes for the pipeline in ``folder``."""
    sdxl = (folder / "text_encoder_2").is_dir()
    levels = len(json.loads((folder / "unet/config.json").read_text(encoding="utf-8"))["block_out_channels"])
    out = {f"model.diffusion_model.{k}": v for k, v in unet_names(_load(folder / "unet"), levels).items()}
    out |= {f"first_stage_model.{k}": v for k, v in vae_names(_load(folder / "vae")).items()}
    first = _load(folder / "text_encoder")
    if sdxl:
        out |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in first.items()}
        second = open_clip_names(_load(folder / "text_encoder_2"))
        out |= {f"conditioner.embedders.1.model.{k}": v for k, v in second.items()}
        out["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    elif json.loads((folder / "unet/config.json").read_text(encoding="utf-8")).get("use_linear_projection"):
        converted = open_clip_names(first)
        layers = 1 + max(int(k.split(".")[2]) for k in converted if k.startswith("transformer.resblocks."))
        for key, value in list(converted.items()):
            if key.startswith(f"transformer.resblocks.{layers - 1}."):
                converted[key.replace(f".{layers - 1}.", f".{layers}.", 1)] = torch.rand_like(value)
        converted["text_projection"], converted["logit_scale"] = torch.rand(24, 24), torch.tensor(1.0)
        out |= {f"cond_stage_model.model.{k}": v for k, v in converted.items()}
    else:
        out |= {f"cond_stage_model.transformer.{k}": v for k, v in first.items()}
    # Entries other than weights in the original files.
    out["betas"], out["alphas_cumprod"] = torch.rand(1000), torch.rand(1000)
    if not sdxl and "cond_stage_model.transformer.text_model.final_layer_norm.weight" in out:
        out["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {key: value.contiguous() for key, value in out.items()}


def _load(folder: Path) -> dict[str, Tensor]:
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    assert not folder.name.startswith("text_encoder") or all(
        key.startswith(("text_model.", "text_projection.")) or "." in key for key in tensors
    )
    if folder.name.startswith("text_encoder"):
        # Current transformers omits the prefix; the script was written for files that have it.
        return {
            k if k.startswith(("text_model.", "text_projection")) else f"text_model.{k}": v for k, v in tensors.items()
        }
    return tensors


def unet_names(tensors: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    blocks = []
    for i in range(levels):
        for j in range(2):
            blocks.append((f"input_blocks.{3 * i + j + 1}.0.", f"down_blocks.{i}.resnets.{j}."))
            blocks.append((f"input_blocks.{3 * i + j + 1}.1.", f"down_blocks.{i}.attentions.{j}."))
        for j in range(3):
            blocks.append((f"output_blocks.{3 * i + j}.0.", f"up_blocks.{i}.resnets.{j}."))
            blocks.append((f"output_blocks.{3 * i + j}.1.", f"up_blocks.{i}.attentions.{j}."))
        if i < levels - 1:
            blocks.append((f"input_blocks.{3 * (i + 1)}.0.op.", f"down_blocks.{i}.downsamplers.0.conv."))
            attended = any(key.startswith(f"up_blocks.{i}.attentions.") for key in tensors)
            blocks.append((f"output_blocks.{3 * i + 2}.{2 if attended else 1}.", f"up_blocks.{i}.upsamplers.0."))
    blocks.append(("middle_block.1.", "mid_block.attentions.0."))
    blocks += [(f"middle_block.{2 * j}.", f"mid_block.resnets.{j}.") for j in range(2)]
    out = {}
    for key, value in tensors.items():
        name = key
        if "resnets" in key:
            for original, diffusers in _RESNET:
                name = name.replace(diffusers, original)
        for original, diffusers in blocks:
            name = name.replace(diffusers, original)
        for original, diffusers in _UNET_ENDS:
            if key.startswith(diffusers):
                name = key.replace(diffusers, original)
        out[name] = value
    return out


def vae_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pairs = [
        ("nin_shortcut", "conv_shortcut"),
        ("norm_out", "conv_norm_out"),
        ("mid.attn_1.", "mid_block.attentions.0."),
    ]
    for i in range(4):
        for j in range(2):
            pairs.append((f"encoder.down.{i}.block.{j}.", f"encoder.down_blocks.{i}.resnets.{j}."))
        if i < 3:
            pairs.append((f"down.{i}.downsample.", f"down_blocks.{i}.downsamplers.0."))
            pairs.append((f"up.{3 - i}.upsample.", f"up_blocks.{i}.upsamplers.0."))
        for j in range(3):
            pairs.append((f"decoder.up.{3 - i}.block.{j}.", f"decoder.up_blocks.{i}.resnets.{j}."))
    pairs += [(f"mid.block_{i + 1}.", f"mid_block.resnets.{i}.") for i in range(2)]
    attention = [
        ("norm.", "group_norm."),
        ("q.", "to_q."),
        ("k.", "to_k."),
        ("v.", "to_v."),
        ("proj_out.", "to_out.0."),
    ]
    out = {}
    for key, value in tensors.items():
        name = key
        for original, diffusers in pairs:
            name = name.replace(diffusers, original)
        if "attentions" in key:
            for original, diffusers in attention:
                name = name.replace(diffusers, original)
        if re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", name):
            value = value.reshape(*value.shape, 1, 1)
        out[name] = value
    return out


def open_clip_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pairs = [
        ("resblocks.", "text_model.encoder.layers."),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        (".c_fc.", ".fc1."),
        (".c_proj.", ".fc2."),
        (".attn", ".self_attn"),
        ("ln_final.", "text_model.final_layer_norm."),
        ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ]
    out: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if match := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", key):
            layer = match[1].removeprefix("text_model.encoder.layers.")
            joined.setdefault(f"transformer.resblocks.{layer}.attn.in_proj_{match[3]}", {})[match[2]] = value
            continue
        if key == "text_projection.weight":
            out["text_projection"] = value.T
            continue
        name = key
        for original, diffusers in pairs:
            name = name.replace(diffusers, original)
        out[f"transformer.{name}" if name.startswith("resblocks.") else name] = value
    return out | {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in joined.items()}
