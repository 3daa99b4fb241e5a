"""LoRA files in kohya format, used by A1111 and ComfyUI: keys such as ``lora_unet_<path>.lora_down.weight``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from sdtune.errors import UserError
from sdtune.formats.files import for_safetensors, write_safetensors
from sdtune.formats.kohya_names import KohyaModule, KohyaTable, fused, separated
from sdtune.formats.lora import LoRAWeights, assemble_pairs, few, unknown_modules

_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


ModelSpecPrediction = Literal["epsilon", "v", "flow"]
"""Prediction types in metadata."""


@dataclass(frozen=True)
class ModelNames:
    """Names of a base model in the metadata of a LoRA file.

    Attributes:
        architecture: ModelSpec's architecture.
        implementation: ModelSpec's implementation, whose module names the file has.
        version: kohya's ``ss_base_model_version``.
        is_v2: kohya's ``ss_v2``: whether it is a Stable Diffusion 2.x model.
    """

    architecture: str
    implementation: str
    version: str
    is_v2: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """Metadata of a LoRA file (Stability-AI/ModelSpec 1.0.1, and kohya's ``ss_`` fields).

    Attributes:
        title: name of the run.
        resolution: training resolution: side in pixels of a square with the area of the training images.
        prediction_type: prediction type of the denoiser.
        steps: number of optimizer steps.
        seed: seed of the run.
        model: names of the backbone.
        trigger: trigger words, if any.
        date: creation date of the file.
    """

    title: str
    resolution: int
    prediction_type: ModelSpecPrediction
    steps: int
    seed: int
    model: ModelNames
    trigger: str | None = None
    date: datetime = field(default_factory=lambda: datetime.now(UTC))

    def metadata(self) -> dict[str, str]:
        """``modelspec.`` fields of a LoRA file."""
        fields = {
            "sai_model_spec": "1.0.1",
            "architecture": f"{self.model.architecture}/lora",
            "implementation": self.model.implementation,
            "title": self.title,
            "resolution": f"{self.resolution}x{self.resolution}",
            "date": self.date.isoformat(timespec="seconds"),
            "prediction_type": self.prediction_type,
        }
        if self.trigger is not None:
            fields["trigger_phrase"] = self.trigger
        return {f"modelspec.{name}": value for name, value in fields.items()}


_MOST_TAGS = 1000


def training_metadata(
    folder: str, captions: Iterable[str], images: int, rates: Mapping[str, float], clip_skip: int
) -> dict[str, str]:
    """kohya's ``ss_`` fields about the data and the learning rates, which programs show for a LoRA.

    Args:
        folder: name of the data.
        captions: caption of each image. Its tags are what commas separate, in lower case, as in kohya; the most
            frequent ones are written.
        images: number of training images, with repeats.
        rates: learning rate by component, ``denoiser`` or a text encoder.
        clip_skip: as in diffusers: 0 skips no layer, which is clip skip 1 in kohya.
    """
    tags: Counter[str] = Counter()
    for caption in captions:
        tags.update(tag.strip().lower() for tag in caption.split(",") if tag.strip())
    encoder = next((rate for name, rate in rates.items() if name.startswith("text_encoder")), None)
    unet = rates.get("denoiser")
    return {
        "ss_tag_frequency": json.dumps({folder: dict(tags.most_common(_MOST_TAGS))}, ensure_ascii=False),
        "ss_num_train_images": str(images),
        "ss_learning_rate": str(unet if unet is not None else encoder),
        "ss_unet_lr": str(unet),
        "ss_text_encoder_lr": str(encoder),
        "ss_clip_skip": str(clip_skip + 1) if clip_skip else "None",
    }


def to_tensors(weights: LoRAWeights, table: KohyaTable) -> dict[str, Tensor]:
    """Tensors by file key, with one alpha for all modules that the file does not join.

    When diffusers converts this format, it loses the alpha of each attention layer: with several alphas it would scale
    such layers by the most frequent one.
    """
    named = fused(weights.uniform(), table)
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in named.pairs.items():
        tensors[f"{name}.{_DOWN}"], tensors[f"{name}.{_UP}"] = down, up
        tensors[f"{name}.{_ALPHA}"] = torch.tensor(named.alphas[name])
    return tensors


def write(
    path: Path,
    weights: LoRAWeights,
    spec: ModelSpec,
    metadata: Mapping[str, str],
    table: KohyaTable,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write ``path``; programs list the LoRA by this file name. Generated fields override those in ``metadata``.

    Args:
        path: the file.
        weights: weights by canonical path.
        spec: generated metadata.
        metadata: further metadata.
        table: names of the backbone's modules.
        dtype: dtype of the matrices.

    Raises:
        UserError: ``path`` cannot be written.
    """
    named = to_tensors(weights, table)
    tensors = for_safetensors({key: value.to(dtype) if value.dim() else value for key, value in named.items()})
    header = {**metadata, **spec.metadata(), **_training_fields(weights, spec)}
    write_safetensors(path, tensors, {**header, **_hashes(tensors, header)})


def parse(source: Path, tensors: Mapping[str, Tensor], table: KohyaTable) -> LoRAWeights:
    """LoRA weights in ``tensors`` read from ``source``; alpha = r if missing, as in kohya.

    Args:
        source: path of the file, for error messages.
        tensors: tensors by file key.
        table: names of the modules that a LoRA may target. kohya's names contain underscores instead of dots, so they
            are resolved with this table.

    Raises:
        UserError: a tensor is not that of a plain LoRA, or its module is not in ``table``.
    """
    joined: dict[str, KohyaModule] = {}
    parts: dict[str, dict[str, Tensor]] = {_DOWN: {}, _UP: {}, _ALPHA: {}}
    unsupported: set[str] = set()
    unknown: set[str] = set()
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        module = table.module(name)
        if part not in parts:
            unsupported.add(key)
        elif module is None:
            unknown.add(name)
        elif module.is_plain:
            parts[part][module.paths[0]] = tensor
        else:
            joined[name], parts[part][name] = module, tensor
    if unsupported:
        raise UserError(
            f"{source}: unsupported tensors: {few(unsupported)}",
            remedy=f"use a plain LoRA with {_DOWN}, {_UP} and {_ALPHA}",
        )
    if unknown:
        raise unknown_modules(source, unknown, table.hints)
    alphas: dict[str, float] = {}
    for path, alpha in parts[_ALPHA].items():
        if alpha.numel() != 1:
            raise UserError(f"{source}: {path}: alpha must be a single number, got shape {list(alpha.shape)}")
        alphas[path] = float(alpha)
    return separated(source, assemble_pairs(source, parts[_DOWN], parts[_UP], alphas), joined)


def _training_fields(weights: LoRAWeights, spec: ModelSpec) -> dict[str, str]:
    """kohya's ``ss_`` fields; ``conv_dim`` and ``conv_alpha`` apply only to kernels larger than 1x1."""
    spatial = {module for module, (down, _) in weights.pairs.items() if down[0].numel() > down.shape[1]}
    alpha = _single_value({float(alpha) for alpha in weights.uniform().alphas.values()})
    arguments = {}
    if spatial:
        arguments = {"conv_dim": _single_value({weights.rank(module) for module in spatial}), "conv_alpha": alpha}
    return {
        "ss_v2": str(spec.model.is_v2),
        "ss_base_model_version": spec.model.version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": _single_value({weights.rank(module) for module in weights.pairs.keys() - spatial or spatial}),
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments),
        "ss_output_name": spec.title,
        "ss_steps": str(spec.steps),
        "ss_seed": str(spec.seed),
    }


def _single_value(values: set[int] | set[float]) -> str:
    """The only value as text, or ``Dynamic`` for several values, as in kohya."""
    return str(next(iter(values))) if len(values) == 1 else "Dynamic"


def _hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Hashes by which A1111 recognizes a file even after its metadata are edited.

    Both are computed for a file with only the ``ss_`` metadata. ``sshs_model_hash`` is the SHA-256 of everything after
    the header; ``sshs_legacy_hash`` is the first 8 hex digits of the SHA-256 of the 64 KiB at offset 1 MiB (no bytes in
    a smaller file).
    Source: kohya-ss/sd-scripts, library/train_util.py, ``precalculate_safetensors_hashes``.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    file = safetensors.torch.save(dict(tensors), training)
    body = 8 + int.from_bytes(file[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(file)[body:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8],
    }
