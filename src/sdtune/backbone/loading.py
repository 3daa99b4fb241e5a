"""Load a backbone from a pipeline folder: weights read from files or initialized randomly."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import ControlNetKind
from sdtune.backbone.families import T5, Family
from sdtune.backbone.families.sd3_backbone import SD3Backbone
from sdtune.backbone.families.sdxl_backbone import SDXLBackbone
from sdtune.backbone.families.unet_backbone import UNetBackbone
from sdtune.backbone.foreign import unreadable_as_user_error
from sdtune.backbone.models import from_config, model_class
from sdtune.backbone.source import PipelineSource
from sdtune.errors import UserError
from sdtune.formats.files import check_finite

_BACKBONES: dict[str, type[Backbone]] = {
    "sd1": UNetBackbone,
    "sd2": UNetBackbone,
    "sdxl": SDXLBackbone,
    "sd3_medium": SD3Backbone,
    "sd35_medium": SD3Backbone,
    "sd35_large": SD3Backbone,
}
"""Backbone class of each family."""


def controlnets_of(family: Family) -> ControlNetKind:
    """The ControlNets of ``family``."""
    return _BACKBONES[family.name].controlnets


def is_controlnet(keys: Collection[str]) -> bool:
    """Whether a file with these tensor names contains a ControlNet of any family."""
    return any(backbone.controlnets.is_in(keys) for backbone in _BACKBONES.values())


T5_DTYPE = torch.bfloat16
"""Dtype of T5: it has 4.8 billion parameters, is not trained, and overflows in float16."""


def load_backbone(source: PipelineSource, seed: int, denoiser_dtype: torch.dtype | None = None) -> Backbone:
    """Load ``source`` on the CPU: frozen, in eval mode, in float32 (the denoiser in dtype ``denoiser_dtype`` if given).

    Raises:
        UserError: a weight is NaN or infinite, in the file or after the cast to ``denoiser_dtype``.
    """
    folder = source.folder()

    def component(name: str) -> Any:
        if source.is_from_scratch(name):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return from_config(name, folder)
        with unreadable_as_user_error(folder / name, "backbone.path"):
            model = model_class(name, folder).from_pretrained(
                folder / name,
                torch_dtype=dtype(name),
                variant=source.weights_variant(name),
                use_safetensors=True,
                local_files_only=True,
            )
        check_finite(dict(model.named_parameters()), f"backbone.path: {folder / name}")
        return model

    def dtype(name: str) -> torch.dtype:
        if name == T5:
            return T5_DTYPE
        return denoiser_dtype or torch.float32 if name == source.denoiser_folder else torch.float32

    # Load on the CPU: the default device may be a GPU with too little memory for float32 weights.
    with torch.device("cpu"):
        # Load the largest model first: its file and its parameters are in memory at the same time.
        folders = sorted(source.components, key=lambda name: name != source.denoiser_folder)
        parts = {"denoiser" if name == source.denoiser_folder else name: component(name) for name in folders}
        parts |= {name: read_tokenizer(folder / name) for name in source.tokenizers}
        return assemble_backbone(source, parts)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``, T5's or CLIP's by the name of the folder.

    Raises:
        UserError: its files are damaged.
    """
    with unreadable_as_user_error(folder, "backbone.path"):
        kind = T5TokenizerFast if folder.name == "tokenizer_3" else CLIPTokenizer
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
        tokenizer("a")  # some damaged values are found only here
        return tokenizer


def assemble_backbone(source: PipelineSource, parts: dict[str, Any]) -> Backbone:
    """Frozen backbone in eval mode from ``parts``: models and tokenizers by folder name.

    Raises:
        UserError: a tokenizer has ids for which its text encoder has no embedding.
    """
    for tokenizer in source.tokenizers:
        _check_token_ids(source, tokenizer, parts)
    backbone = _BACKBONES[source.facts.family.name](
        tokenizers={name: parts[name] for name in source.tokenizers},
        encoders={name: parts[name] for name in source.text_encoders},
        vae=parts["vae"],
        denoiser=parts["denoiser"],
        scheduler_config=source.scheduler(),
        facts=source.facts,
        clip_skip=source.clip_skip,
    )
    backbone.requires_grad_(False)
    return backbone.eval()


def _check_token_ids(source: PipelineSource, tokenizer: str, parts: dict[str, Any]) -> None:
    largest = max(parts[tokenizer].get_vocab().values(), default=0)
    count = parts[tokenizer.replace("tokenizer", "text_encoder")].get_input_embeddings().num_embeddings
    if largest >= count:
        raise UserError(
            f"the {tokenizer} of {source.path} has the token id {largest}, but its text encoder has {count} embeddings",
            key="backbone.path",
            remedy="copy or download it again",
        )
