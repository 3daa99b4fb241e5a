"""Names of a multimodal diffusion transformer (MM-DiT): the original layout, and diffusers' SD3Transformer2DModel.

Source of the original names: Stability-AI/sd3.5, ``mmditx.py``. It stores query, key and value as one tensor. Its last
block modulates the text tokens, and its final layer the image tokens, by (shift, scale); diffusers by (scale, shift).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sdtune.formats.original.table import TensorEntry

_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}


def mmdit_entries(names: Collection[str], config: Mapping[str, Any]) -> list[TensorEntry]:
    """Entries of an SD3Transformer2DModel with the diffusers ``config``; ``names`` follow from it."""
    entries = [TensorEntry("pos_embed", ("pos_embed.pos_embed",))]
    for original, name in _ENDS.items():
        entries += _layer(original, name)
    entries += _swapped("final_layer.adaLN_modulation.1", "norm_out.linear")
    layers, has_norm = int(config["num_layers"]), config.get("qk_norm") is not None
    dual_layers = config.get("dual_attention_layers") or ()
    for i in range(layers):
        image, text, block = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block", f"transformer_blocks.{i}"
        entries += _layer(f"{image}.adaLN_modulation.1", f"{block}.norm1.linear")
        entries += _attention(f"{image}.attn", f"{block}.attn", has_norm)
        if i in dual_layers:
            entries += _attention(f"{image}.attn2", f"{block}.attn2", has_norm)
        entries += _feed_forward(image, f"{block}.ff")
        entries += _text_attention(f"{text}.attn", f"{block}.attn", has_norm)
        # The text tokens are not used after the last block, so it has no layers behind their attention.
        if i == layers - 1:
            entries += _swapped(f"{text}.adaLN_modulation.1", f"{block}.norm1_context.linear")
        else:
            entries += _layer(f"{text}.adaLN_modulation.1", f"{block}.norm1_context.linear")
            entries += _layer(f"{text}.attn.proj", f"{block}.attn.to_add_out")
            entries += _feed_forward(text, f"{block}.ff_context")
    return entries


def _layer(original: str, *names: str) -> Iterator[TensorEntry]:
    for suffix in ("weight", "bias"):
        yield TensorEntry(f"{original}.{suffix}", tuple(f"{name}.{suffix}" for name in names))


def _swapped(original: str, name: str) -> Iterator[TensorEntry]:
    for suffix in ("weight", "bias"):
        yield TensorEntry(f"{original}.{suffix}", (f"{name}.{suffix}",), "halves_swapped")


def _attention(original: str, name: str, has_norm: bool) -> Iterator[TensorEntry]:
    yield from _layer(f"{original}.qkv", f"{name}.to_q", f"{name}.to_k", f"{name}.to_v")
    yield from _layer(f"{original}.proj", f"{name}.to_out.0")
    for part in "qk" if has_norm else "":
        yield TensorEntry(f"{original}.ln_{part}.weight", (f"{name}.norm_{part}.weight",))


def _text_attention(original: str, name: str, has_norm: bool) -> Iterator[TensorEntry]:
    yield from _layer(f"{original}.qkv", f"{name}.add_q_proj", f"{name}.add_k_proj", f"{name}.add_v_proj")
    for part in "qk" if has_norm else "":
        yield TensorEntry(f"{original}.ln_{part}.weight", (f"{name}.norm_added_{part}.weight",))


def _feed_forward(original: str, name: str) -> Iterator[TensorEntry]:
    yield from _layer(f"{original}.mlp.fc1", f"{name}.net.0.proj")
    yield from _layer(f"{original}.mlp.fc2", f"{name}.net.2")
