"""Names of CLIP text encoders in OpenCLIP (SD 2.x, second text encoder of SDXL) and in transformers.

OpenCLIP stores query, key and value as one tensor, and the projection transposed (mlfoundations/open_clip,
``src/open_clip/transformer.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sdtune.formats.original.table import TensorEntry

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
_UNUSED = ("logit_scale", "attn_mask", "text_projection")
"""Tensors of the contrastive training, which are in the files; SD 2.x does not use the projection either."""


def open_clip_entries(names: Collection[str], config: Mapping[str, Any]) -> list[TensorEntry]:
    """Entries of a text encoder with the transformers ``config``; with the projection if ``names`` contains it."""
    entries = [TensorEntry(original, (f"text_model.{name}",)) for name, original in _ENDS.items()]
    for i in range(int(config["num_hidden_layers"])):
        layer, block = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for suffix in ("weight", "bias"):
            for name, original in _LAYER.items():
                entries.append(TensorEntry(f"{block}.{original}.{suffix}", (f"{layer}.{name}.{suffix}",)))
            projections = tuple(f"{layer}.self_attn.{name}.{suffix}" for name in _PROJECTIONS)
            entries.append(TensorEntry(f"{block}.attn.in_proj_{suffix}", projections))
    if "text_projection.weight" in names:
        entries.append(TensorEntry("text_projection", ("text_projection.weight",), "transposed"))
    return entries


def is_unused_in_open_clip(key: str, config: Mapping[str, Any]) -> bool:
    """Whether Stable Diffusion does not use the OpenCLIP tensor ``key``, such as those of layers beyond ``config``.

    SD 2.x uses the penultimate hidden states, so its transformers models omit the last layer.
    """
    parts = key.split(".")
    is_layer = key.startswith("transformer.resblocks.") and parts[2].isdigit()
    return key in _UNUSED or (is_layer and int(parts[2]) >= int(config["num_hidden_layers"]))


def same_entries(names: Collection[str], config: Mapping[str, Any]) -> list[TensorEntry]:
    """Entries of a text encoder that the file stores with its transformers names."""
    return [TensorEntry(name, (name,)) for name in names]


def with_text_model(key: str) -> str:
    """``key`` with the prefix ``text_model.``, which transformers >= 5.6 omits; the projection has none."""
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
