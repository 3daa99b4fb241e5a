"""Convert CLIP text encoders between OpenCLIP names (SD 2.x, second text encoder of SDXL) and transformers names.

OpenCLIP stores query, key and value as one tensor, and the projection transposed (mlfoundations/open_clip,
``src/open_clip/transformer.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
UNUSED = ("logit_scale", "attn_mask")
"""Tensors of the contrastive training, which are in the files but not used by Stable Diffusion."""


def from_open_clip(tensors: Mapping[str, Tensor], layers: int, projected: bool) -> dict[str, Tensor]:
    """Convert OpenCLIP tensors to transformers names (prefix ``text_model.``), without layers beyond ``layers``.

    Args:
        tensors: tensors by OpenCLIP name, without a prefix.
        layers: number of layers of the result: SD 2.x uses the penultimate hidden states and omits the last layer.
        projected: whether the result includes the projection.
    """
    converted: dict[str, Tensor] = {}
    for name, original in _pairs(layers):
        for suffix in ("weight", "bias"):
            if f"{original}.{suffix}" in tensors:
                converted[f"{name}.{suffix}"] = tensors[f"{original}.{suffix}"]
    for name, original in _ENDS.items():
        if original in tensors:
            converted[f"text_model.{name}"] = tensors[original]
    for layer in range(layers):
        for suffix in ("weight", "bias"):
            joined = tensors.get(f"transformer.resblocks.{layer}.attn.in_proj_{suffix}")
            for name, part in zip(_PROJECTIONS, joined.chunk(3) if joined is not None else (), strict=False):
                # Copy: the three parts must not share the storage of the joined tensor.
                converted[f"text_model.encoder.layers.{layer}.self_attn.{name}.{suffix}"] = part.clone()
    if projected and "text_projection" in tensors:
        converted["text_projection.weight"] = tensors["text_projection"].T.contiguous()
    return converted


def to_open_clip(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Convert transformers tensors (prefix ``text_model.``, except the projection) to OpenCLIP names."""
    converted = {original: tensors[f"text_model.{name}"] for name, original in _ENDS.items()}
    for name, original in _pairs(layers):
        converted |= {f"{original}.{suffix}": tensors[f"{name}.{suffix}"] for suffix in ("weight", "bias")}
    for layer in range(layers):
        attention = f"text_model.encoder.layers.{layer}.self_attn"
        for suffix in ("weight", "bias"):
            parts = [tensors[f"{attention}.{name}.{suffix}"] for name in _PROJECTIONS]
            converted[f"transformer.resblocks.{layer}.attn.in_proj_{suffix}"] = torch.cat(parts)
    if "text_projection.weight" in tensors:
        converted["text_projection"] = tensors["text_projection.weight"].T.contiguous()
    return converted


def expected(layers: int, projected: bool) -> set[str]:
    """OpenCLIP tensor names that a text encoder with ``layers`` layers uses."""
    names = set(_ENDS.values()) | {
        f"{original}.{suffix}" for _, original in _pairs(layers) for suffix in ("weight", "bias")
    }
    names |= {
        f"transformer.resblocks.{i}.attn.in_proj_{suffix}" for i in range(layers) for suffix in ("weight", "bias")
    }
    return names | ({"text_projection"} if projected else set())


def _pairs(layers: int) -> Iterator[tuple[str, str]]:
    for layer in range(layers):
        for name, original in _LAYER.items():
            yield f"text_model.encoder.layers.{layer}.{name}", f"transformer.resblocks.{layer}.{original}"
