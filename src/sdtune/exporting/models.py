"""Write a whole model as a pipeline folder or as a single file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.pretrained import Pretrained
from sdtune.backbone.words import plain_vocabulary
from sdtune.errors import UserError
from sdtune.files import replacing, write_json
from sdtune.formats import write_safetensors
from sdtune.formats.keys import canonical_key, is_buffer
from sdtune.formats.original import Models, join
from sdtune.formats.pipeline import copy_pipeline, weights_name


def components(backbone: Backbone) -> dict[str, dict[str, Tensor]]:
    """Every model's tensors by canonical name, without new words."""
    found: dict[str, dict[str, Tensor]] = {}
    with plain_vocabulary(backbone):
        for name in ("unet", "vae", *backbone.encoders):
            tensors = getattr(backbone, name).state_dict()
            found[name] = {canonical_key(name, key): value for key, value in tensors.items() if not is_buffer(key)}
    return found


def cast_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point ``tensors`` in ``dtype``; UserError for one that it cannot hold."""
    made = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    over = next((key for key, value in made.items() if value.is_floating_point() and not value.isfinite().all()), None)
    if over is not None:
        raise UserError(
            f"{over} has values that {str(dtype).removeprefix('torch.')} cannot hold",
            key="dtype",
            remedy="give dtype=bf16",
        )
    return made


def write_pipeline(backbone: Backbone, source: Pretrained, target: Path, dtype: torch.dtype) -> None:
    """A pipeline folder in the diffusers layout, safetensors of ``dtype``."""
    parts = components(backbone)
    with replacing(target) as place:
        copy_pipeline(source.folder(), place, without=list(parts), weights={})
        for name, tensors in parts.items():
            write_json(place / name / "config.json", source.config(name))
            write_safetensors(place / name / weights_name(name), cast_tensors(tensors, dtype), {"format": "pt"})
        write_json(place / "scheduler" / "scheduler_config.json", backbone.scheduler_config)


def write_single_file(
    backbone: Backbone, source: Pretrained, file: Path, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """One file in the original layout, with the markers by which ComfyUI knows a v-prediction model."""
    family = backbone.facts.family
    configs = {name: source.config(name) for name in source.components}
    tensors = join(
        {name: cast_tensors(own, dtype) for name, own in components(backbone).items()},
        Models(family, **configs),
        v_prediction=backbone.prediction_type == "v_prediction",
        zero_snr=bool(backbone.scheduler_config.get("rescale_betas_zero_snr")),
    )
    architectures = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}
    about = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architectures[family],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": file.stem,
        "modelspec.prediction_type": "v" if backbone.prediction_type == "v_prediction" else "epsilon",
        "modelspec.resolution": f"{backbone.facts.side}x{backbone.facts.side}",
    }
    write_safetensors(file, tensors, {**about, **metadata})
