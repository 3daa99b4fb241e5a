"""Write a full model as a pipeline folder or as a single file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.families import model_spec_prediction
from sdtune.backbone.new_token_vectors import without_new_tokens
from sdtune.backbone.pretrained import Pretrained
from sdtune.backbone.source import unused_folders
from sdtune.errors import UserError
from sdtune.files import replacing, write_json
from sdtune.formats import write_safetensors
from sdtune.formats.files import is_finite
from sdtune.formats.keys import canonical_key, is_redundant
from sdtune.formats.original import join
from sdtune.formats.pipeline import copy_pipeline, weights_name, write_scheduler


def components(backbone: Backbone) -> dict[str, dict[str, Tensor]]:
    """Tensors of each model by canonical name, without the embeddings of new tokens."""
    tensors_of: dict[str, dict[str, Tensor]] = {}
    with without_new_tokens(backbone):
        models = {backbone.facts.family.denoiser: backbone.denoiser, "vae": backbone.vae, **backbone.encoders}
        for name, model in models.items():
            tensors = model.state_dict()
            tensors_of[name] = {
                canonical_key(name, key): value for key, value in tensors.items() if not is_redundant(key)
            }
    return tensors_of


def cast_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """``tensors`` with the floating-point ones cast to ``dtype``.

    Raises:
        UserError: a value is outside the range of ``dtype``.
    """
    converted = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    key = next((key for key, value in converted.items() if not is_finite(value)), None)
    if key is not None:
        raise UserError(
            f"{key} has values outside the range of {str(dtype).removeprefix('torch.')}",
            key="dtype",
            remedy="set dtype=bf16",
        )
    return converted


def write_pipeline(backbone: Backbone, source: Pretrained, target: Path, dtype: torch.dtype) -> None:
    """Write a pipeline folder in the diffusers layout, as safetensors in ``dtype``."""
    models = components(backbone)
    with replacing(target) as folder:
        copy_pipeline(source.folder(), folder, list(models), weights={}, absent=unused_folders(source))
        for name, tensors in models.items():
            write_json(folder / name / "config.json", source.config(name))
            write_safetensors(folder / name / weights_name(name), cast_tensors(tensors, dtype), {"format": "pt"})
        write_scheduler(folder, backbone.scheduler_config)


def write_single_file(
    backbone: Backbone, source: Pretrained, file: Path, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Write one file in the original layout, with the keys by which ComfyUI detects a v-prediction model."""
    family = backbone.facts.family
    configs = {name: source.config(name) for name in source.components}
    tensors = join(
        {name: cast_tensors(model, dtype) for name, model in components(backbone).items()},
        family.layout,
        configs,
        v_prediction=backbone.path.prediction_type == "v_prediction",
        zero_snr=bool(backbone.scheduler_config.get("rescale_betas_zero_snr")),
    )
    artifact_metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": file.stem,
        "modelspec.prediction_type": model_spec_prediction(backbone.path.prediction_type),
        "modelspec.resolution": f"{backbone.facts.side}x{backbone.facts.side}",
    }
    write_safetensors(file, tensors, {**artifact_metadata, **metadata})
