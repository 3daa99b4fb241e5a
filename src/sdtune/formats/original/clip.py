"""CLIP's text encoder under OpenCLIP's names, as SD 2.x and SDXL's second encoder have it, and back.

OpenCLIP keeps query, key and value as one tensor, and its projection transposed (mlfoundations/open_clip,
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
"""Of the contrastive training: in the files, not in the text encoder that conditions a UNet."""


def from_open_clip(tensors: Mapping[str, Tensor], layers: int, projected: bool) -> dict[str, Tensor]:
    """transformers' tensors, ``text_model.`` before each, of OpenCLIP's; those beyond ``layers`` left out.

    Args:
        tensors: by OpenCLIP's names, without a prefix.
        layers: of the wanted encoder: SD 2.x conditions on the penultimate states, and leaves the last layer out.
        projected: whether the wanted encoder has the projection.
    """
    found: dict[str, Tensor] = {}
    for ours, theirs in _pairs(layers):
        for suffix in ("weight", "bias"):
            if f"{theirs}.{suffix}" in tensors:
                found[f"{ours}.{suffix}"] = tensors[f"{theirs}.{suffix}"]
    for ours, theirs in _ENDS.items():
        if theirs in tensors:
            found[f"text_model.{ours}"] = tensors[theirs]
    for layer in range(layers):
        for suffix in ("weight", "bias"):
            joined = tensors.get(f"transformer.resblocks.{layer}.attn.in_proj_{suffix}")
            for name, part in zip(_PROJECTIONS, joined.chunk(3) if joined is not None else (), strict=False):
                # A copy: the file must not hold one tensor three times over.
                found[f"text_model.encoder.layers.{layer}.self_attn.{name}.{suffix}"] = part.clone()
    if projected and "text_projection" in tensors:
        found["text_projection.weight"] = tensors["text_projection"].T.contiguous()
    return found


def to_open_clip(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The other way; ``tensors`` are transformers', with ``text_model.`` before each but the projection."""
    found = {theirs: tensors[f"text_model.{ours}"] for ours, theirs in _ENDS.items()}
    for ours, theirs in _pairs(layers):
        found |= {f"{theirs}.{suffix}": tensors[f"{ours}.{suffix}"] for suffix in ("weight", "bias")}
    for layer in range(layers):
        attention = f"text_model.encoder.layers.{layer}.self_attn"
        for suffix in ("weight", "bias"):
            parts = [tensors[f"{attention}.{name}.{suffix}"] for name in _PROJECTIONS]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{suffix}"] = torch.cat(parts)
    if "text_projection.weight" in tensors:
        found["text_projection"] = tensors["text_projection.weight"].T.contiguous()
    return found


def expected(layers: int, projected: bool) -> set[str]:
    """The names, OpenCLIP's, from which an encoder of ``layers`` is made."""
    names = set(_ENDS.values()) | {
        f"{theirs}.{suffix}" for _, theirs in _pairs(layers) for suffix in ("weight", "bias")
    }
    names |= {
        f"transformer.resblocks.{i}.attn.in_proj_{suffix}" for i in range(layers) for suffix in ("weight", "bias")
    }
    return names | ({"text_projection"} if projected else set())


def _pairs(layers: int) -> Iterator[tuple[str, str]]:
    for layer in range(layers):
        for ours, theirs in _LAYER.items():
            yield f"text_model.encoder.layers.{layer}.{ours}", f"transformer.resblocks.{layer}.{theirs}"
