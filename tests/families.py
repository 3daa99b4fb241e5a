"""Small models with the structure of SD 1.x, 2.x, SDXL and SD 3: levels, transformer depths, heads, encoders, names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from sd3_models import SETTINGS
from sdtune.paths import pocket_pipeline

Family = Literal["sd1", "sd2", "sdxl"]
FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")
EACH = [pytest.param(family, marks=() if family == "sd1" else pytest.mark.slow) for family in FAMILIES]
"""Parameters for tests of every family: ``make test`` runs the first, ``make test-slow`` the others."""

_DOWN, _CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
_UP, _CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"

_UNETS: dict[Family, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": (_CROSS, _CROSS, _CROSS, _DOWN),
        "up_block_types": (_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP),
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
    },
    "sd2": {
        "block_out_channels": (20, 40, 80, 80),
        "down_block_types": (_CROSS, _CROSS, _CROSS, _DOWN),
        "up_block_types": (_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 24,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (20, 40, 80),
        "down_block_types": (_DOWN, _CROSS, _CROSS),
        "up_block_types": (_CROSS_UP, _CROSS_UP, _UP),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 40,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
}


SD3 = Literal["sd3_medium", "sd35_medium", "sd35_large"]
SD3_FAMILIES: tuple[SD3, ...] = ("sd3_medium", "sd35_medium", "sd35_large")


def build_sd3(folder: Path, family: SD3, seed: int = 0) -> Path:
    """Save a pipeline of ``family`` with random weights that float16 represents exactly; 64x64 pixels, VAE factor 8."""
    torch.manual_seed(seed)
    encoders = _encoder(16, "quick_gelu", projected=True, projection=16), _encoder(24, "gelu", projected=True)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        pos_embed_max_size=12,
        **SETTINGS[family],
    )
    vae = _vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    parts = [transformer, vae, *encoders, _t5(48)]
    for parameter in (parameter for part in parts for parameter in part.parameters()):
        parameter.data = parameter.data.half().float()
    return _save_sd3(folder, *parts)


def build_learner(folder: Path, seed: int = 0) -> Path:
    """Save a pipeline of SD 3.5 medium over the VAE of pocket that learns simple images in minutes; 64x64 pixels.

    All other weights are random. Those of the CLIP encoders are larger than usual, so that two captions differ enough.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(pocket_pipeline() / "vae", local_files_only=True)
    vae.register_to_config(shift_factor=1.0)  # large, so that an error in its use would show
    channels, width = vae.config.latent_channels, 128
    transformer = SD3Transformer2DModel(
        sample_size=64 // 2 ** (len(vae.config.block_out_channels) - 1),
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=width // 4,
        joint_attention_dim=width,
        caption_projection_dim=width,
        pooled_projection_dim=96,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    encoders = [_encoder(48, kind, projected=True, projection=48, scale=5.0) for kind in ("quick_gelu", "gelu")]
    return _save_sd3(folder, transformer, vae, *encoders, _t5(width))


def _save_sd3(folder: Path, transformer: Any, vae: Any, first: Any, second: Any, t5: Any) -> Path:
    first.text_projection.weight.data = torch.eye(first.config.hidden_size)
    StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=_tokenizer("<|endoftext|>"),
        tokenizer_2=_tokenizer("!"),
        tokenizer_3=T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(_PIECES)], extra_ids=0),
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=t5,
    ).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        _write_vocabulary(folder / name)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["tokenizer_3"] = ["transformers", "T5TokenizerFast"]  # as published; older releases have two classes
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    file = folder / "tokenizer_3" / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["extra_special_tokens"]  # a list, which older releases do not read
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_PIECES) + 2,
            d_model=width,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


_PIECES = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz<>,_ABC0123456789"]
"""Vocabulary of the T5 tokenizer: with its ids for padding, end and unknown pieces, and single characters."""


def build_family(folder: Path, family: Family, seed: int = 0) -> Path:
    """Save a pipeline of ``family`` with random weights that float16 represents exactly; VAE factor 8.

    The image size is 128x128 pixels, for SDXL 64x64. The middle block, after three (SDXL: two) downsamplings, then
    attends to more than one position.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8 if family == "sdxl" else 16, layers_per_block=2, norm_num_groups=4, **_UNETS[family]
    )
    vae = _vae(scaling_factor=0.13025 if family == "sdxl" else 0.18215)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if family == "sd2" else "epsilon",
    )
    parts: dict[str, Any] = {"unet": unet, "vae": vae, "scheduler": scheduler}
    parts["tokenizer"] = _tokenizer("!" if family == "sd2" else "<|endoftext|>")
    parts["text_encoder"] = _encoder(24 if family == "sd2" else 16, "gelu" if family == "sd2" else "quick_gelu")
    if family == "sdxl":
        parts |= {"tokenizer_2": _tokenizer("!"), "text_encoder_2": _encoder(24, "gelu", projected=True)}
        pipeline: Any = StableDiffusionXLPipeline(**parts)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for parameter in getattr(pipeline, name).parameters() if hasattr(pipeline, name) else ():
            parameter.data = parameter.data.half().float()
    pipeline.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        if name in parts:
            _write_vocabulary(folder / name)
    return folder


def _vae(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=64,
        **settings,
    )


def _tokens() -> dict[str, int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{b}</w>" for b in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def _tokenizer(pad: str) -> CLIPTokenizer:
    return CLIPTokenizer(vocab=_tokens(), merges=[], model_max_length=77, pad_token=pad)


def _write_vocabulary(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps(_tokens()), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def _encoder(width: int, activation: str, projected: bool = False, projection: int = 24, scale: float = 1.0) -> Any:
    """A CLIP text encoder with random weights; ``scale``: factor on the usual ones."""
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=len(_tokens()),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act=activation,
            projection_dim=projection,
            initializer_factor=scale,
            # As in the real configs; the end token of the tokenizer differs.
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    )
