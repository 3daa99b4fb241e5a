"""Tiny models of Stable Diffusion 3 with random weights, and the true ones on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sdtune.formats.keys import canonical_key, is_redundant

LAYERS = 3
TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": LAYERS,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "joint_attention_dim": 16,
    "caption_projection_dim": 8,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 6,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "sd3_medium": {"qk_norm": None, "dual_attention_layers": ()},
    "sd35_medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "sd35_large": {"qk_norm": "rms_norm", "dual_attention_layers": ()},
}
"""What distinguishes the transformers of the families."""


def tiny_transformer(name: str) -> SD3Transformer2DModel:
    """A transformer of the family ``name``."""
    return SD3Transformer2DModel(**TRANSFORMER, **SETTINGS[name])


def tiny_models(name: str) -> dict[str, Any]:
    """All models of a pipeline of the family ``name`` with random weights, by component."""
    torch.manual_seed(0)
    clip = {"vocab_size": 20, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    first = CLIPTextModelWithProjection(CLIPTextConfig(**clip, hidden_size=8, projection_dim=8))
    first.text_projection.weight.data = torch.eye(8)
    return {
        "transformer": tiny_transformer(name),
        "vae": AutoencoderKL(
            block_out_channels=(8,),
            norm_num_groups=4,
            latent_channels=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": first,
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**clip, hidden_size=12, projection_dim=12)),
        "text_encoder_3": T5EncoderModel(
            T5Config(
                vocab_size=24, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
            )
        ),
    }


def tensors_of(models: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Tensors of each component by canonical name."""
    return {
        component: {
            canonical_key(component, key): value for key, value in model.state_dict().items() if not is_redundant(key)
        }
        for component, model in models.items()
    }


def configs_of(models: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Config of each component."""
    return {
        component: model.config.to_dict() if component.startswith("text_encoder") else dict(model.config)
        for component, model in models.items()
    }
