"""Names of UNet, VAE and ControlNet in diffusers and in the original layout.

Source of the original names: CompVis/stable-diffusion, ``ldm/modules/diffusionmodules/openaimodel.py`` (UNetModel) and
``model.py`` (Encoder, Decoder); Stability-AI/generative-models has the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sdtune.formats.original.table import TensorEntry

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_VAE_PROJECTION = re.compile(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")


def unet_entries(names: Iterable[str], config: Mapping[str, Any]) -> list[TensorEntry]:
    """Entries of the tensors ``names`` of a UNet with the diffusers ``config``."""
    blocks = _unet_blocks(config)
    return [TensorEntry(_rename(name, blocks, _UNET_RESNET), (name,)) for name in names]


def vae_entries(names: Iterable[str], config: Mapping[str, Any]) -> list[TensorEntry]:
    """Entries of the tensors ``names`` of an AutoencoderKL with the diffusers ``config``.

    The attention weights are linear in diffusers, and 1x1 convolutions in the original layout.
    """
    blocks, inner = _vae_blocks(config), {"conv_shortcut": "nin_shortcut", **_VAE_ATTENTION}
    return [
        TensorEntry(_rename(name, blocks, inner), (name,), "convolution" if _VAE_PROJECTION.search(name) else "none")
        for name in names
    ]


def modern_vae_key(key: str) -> str:
    """``key`` with the VAE attention names used since diffusers 0.17; older files contain older names."""
    return re.sub(
        r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}.{_OLD_VAE_ATTENTION[match[2]]}.",
        key,
    )


def _rename(key: str, blocks: Mapping[str, str], inner: Mapping[str, str]) -> str:
    block = next(start for start in blocks if key.startswith(f"{start}."))
    rest = key[len(block) + 1 :]
    part = next((name for name in inner if rest.startswith(f"{name}.")), None)
    # Modules of transformer blocks have the same names in both layouts.
    if part is not None and not rest.startswith("transformer_blocks."):
        rest = f"{inner[part]}{rest[len(part) :]}"
    return f"{blocks[block]}.{rest}"


def _unet_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    blocks = dict(_UNET_ENDS)
    downs, ups, layers = config["down_block_types"], config["up_block_types"], config["layers_per_block"]
    index = 1
    for i, kind in enumerate(downs):
        for j in range(layers):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{index}.0"
            if "CrossAttn" in kind:
                blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{index}.1"
            index += 1
        if i < len(downs) - 1:
            blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    index = 0
    for i, kind in enumerate(ups):
        for j in range(layers + 1):
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{index}.0"
            if "CrossAttn" in kind:
                blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{index}.1"
            if i < len(ups) - 1 and j == layers:
                upsampler = 2 if "CrossAttn" in kind else 1
                blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{index}.{upsampler}.conv"
            index += 1
    return blocks


def _vae_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    levels, layers = len(config["block_out_channels"]), config.get("layers_per_block", 1)
    blocks = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        blocks |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        blocks |= {f"{half}.conv_norm_out": f"{half}.norm_out"}
        blocks |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in (0, 1)}
        blocks |= {f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1"}
    for i in range(levels):
        for j in range(layers):
            blocks[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        for j in range(layers + 1):
            blocks[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{levels - 1 - i}.block.{j}"
        blocks[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        blocks[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{levels - 1 - i}.upsample.conv"
    return blocks


def controlnet_entries(names: Iterable[str], config: Mapping[str, Any]) -> list[TensorEntry]:
    """Entries of the tensors ``names`` of a ControlNet with the diffusers ``config``.

    Source: lllyasviel/ControlNet, ``cldm/cldm.py``: the map embedding is one list of convolutions and activations.
    """
    layers = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)
    blocks = {
        name: original
        for name, original in _unet_blocks({**config, "up_block_types": ()}).items()
        if "out." not in original
    }
    embedding = "controlnet_cond_embedding"
    blocks |= {f"{embedding}.conv_in": "input_hint_block.0"}
    blocks |= {f"{embedding}.blocks.{i}": f"input_hint_block.{2 * (i + 1)}" for i in range(layers)}
    blocks |= {f"{embedding}.conv_out": f"input_hint_block.{2 * (layers + 1)}"}
    skips = len([name for name in blocks if ".resnets." in name and name.startswith("down")])
    skips += len([name for name in blocks if name.endswith("downsamplers.0.conv")]) + 1
    blocks |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(skips)}
    blocks |= {"controlnet_mid_block": "middle_block_out.0"}
    return [TensorEntry(_rename(name, blocks, _UNET_RESNET), (name,)) for name in names]
