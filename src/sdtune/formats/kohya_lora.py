"""LoRA files in kohya's format, read by A1111 and ComfyUI: ``lora_unet_<path>.lora_down.weight`` and others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from sdtune.errors import UserError
from sdtune.formats.files import portable, write_safetensors
from sdtune.formats.lora import LoRAWeights, assemble_pairs, few
from sdtune.formats.original import Family
from sdtune.formats.original.names import rename_unet_module

Architecture = Literal[
    "stable-diffusion-v1", "stable-diffusion-v2-512", "stable-diffusion-v2-768-v", "stable-diffusion-xl-v1-base"
]
"""ModelSpec's names."""

XL: Architecture = "stable-diffusion-xl-v1-base"

_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_XL_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_VERSIONS: dict[Architecture, str] = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2-512": "sd_v2",
    "stable-diffusion-v2-768-v": "sd_v2",
    XL: "sdxl_base_v1-0",
}
_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


@dataclass(frozen=True)
class ModelSpec:
    """What a file tells about itself (Stability-AI/ModelSpec 1.0.1, and kohya's ``ss_`` fields).

    Attributes:
        title: the run's name.
        resolution: side in pixels of the square that sets the area trained at.
        prediction_type: what the UNet predicts.
        steps: optimizer steps trained.
        seed: the run's.
        architecture: of the backbone.
        trigger: the words that call up what was learnt, if there are any.
        date: of the file.
    """

    title: str
    resolution: int
    prediction_type: Literal["epsilon", "v"]
    steps: int
    seed: int
    architecture: Architecture = "stable-diffusion-v1"
    trigger: str | None = None
    date: datetime = field(default_factory=lambda: datetime.now(UTC))

    def metadata(self) -> dict[str, str]:
        """The ``modelspec.`` fields of a LoRA file."""
        fields = {
            "sai_model_spec": "1.0.1",
            "architecture": f"{self.architecture}/lora",
            # kohya's choice: the module names of SD 1 and 2 are diffusers', and SDXL's those of the original layout.
            "implementation": "https://github.com/Stability-AI/generative-models"
            if self.architecture == XL
            else "diffusers",
            "title": self.title,
            "resolution": f"{self.resolution}x{self.resolution}",
            "date": self.date.isoformat(timespec="seconds"),
            "prediction_type": self.prediction_type,
        }
        if self.trigger is not None:
            fields["trigger_phrase"] = self.trigger
        return {f"modelspec.{name}": value for name, value in fields.items()}


def architecture(family: Family, velocity: bool) -> Architecture:
    """ModelSpec's name of a Stable Diffusion of ``family``; ``velocity``: its UNet predicts v."""
    second: Architecture = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
    found: dict[Family, Architecture] = {"sd1": "stable-diffusion-v1", "sd2": second, "sdxl": XL}
    return found[family]


def name_of(module: str, xl: Mapping[str, Any] | None = None) -> str:
    """kohya's name of a diffusers module path, canonical and with its component.

    ``xl`` is SDXL's UNet config: kohya names its modules after the original layout, others' after diffusers'.
    """
    component, _, path = module.partition(".")
    if xl is None:
        return _PREFIXES[component] + path.replace(".", "_")
    own = rename_unet_module(path, xl) if component == "unet" else path
    return _XL_PREFIXES[component] + own.replace(".", "_")


def to_tensors(weights: LoRAWeights, xl: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The tensors by file key, with one alpha for all modules.

    diffusers loses an attention layer's own alpha when it converts this form: with several alphas it would scale
    such layers by the most frequent one.
    """
    weights = weights.uniform()
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in weights.pairs.items():
        name = name_of(module, xl)
        tensors[f"{name}.{_DOWN}"], tensors[f"{name}.{_UP}"] = down, up
        tensors[f"{name}.{_ALPHA}"] = torch.tensor(weights.alphas[module])
    return tensors


def write(
    path: Path,
    weights: LoRAWeights,
    spec: ModelSpec,
    metadata: Mapping[str, str],
    unet: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes ``path``; programs list the adapter by this file's name. Own fields win over equal ones in ``metadata``.

    Args:
        unet: the config of the UNet that it is for; only SDXL's is looked at.
        dtype: of the matrices.

    Raises:
        UserError: ``path`` cannot be written.
    """
    named = to_tensors(weights, unet if spec.architecture == XL else None)
    tensors = portable({key: value.to(dtype) if value.dim() else value for key, value in named.items()})
    header = {**metadata, **spec.metadata(), **_training_fields(weights, spec)}
    write_safetensors(path, tensors, {**header, **_hashes(tensors, header)})


def parse(
    source: Path, tensors: Mapping[str, Tensor], modules: Iterable[str], xl: Mapping[str, Any] | None = None
) -> LoRAWeights:
    """The weights in what was read from ``source``; alpha = r where it is not given, as in kohya.

    Args:
        source: the file's path, for messages.
        tensors: by file key.
        modules: every module path, canonical and with its component, that an adapter may name. The names in the
            file have lost their dots, so the way back is found by going forth from these.
        xl: SDXL's UNet config where the backbone is SDXL; then diffusers' names with underscores are known too.

    Raises:
        UserError: a tensor that is not plain LoRA, or of none of ``modules``.
    """
    paths: dict[str, str] = {}
    for module in modules:
        for name in _names(module, xl):
            assert paths.setdefault(name, module) == module, f"{module} and another share a name"
    parts: dict[str, dict[str, Tensor]] = {_DOWN: {}, _UP: {}, _ALPHA: {}}
    strange: set[str] = set()
    unknown: set[str] = set()
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        if part not in parts:
            strange.add(key)
        elif name not in paths:
            unknown.add(name)
        else:
            parts[part][paths[name]] = tensor
    if strange:
        raise UserError(f"{source}: {few(strange)}: not read; plain LoRA with {_DOWN}, {_UP} and {_ALPHA} is")
    if unknown:
        raise UserError(
            f"{source}: {few(unknown)}: no such module in this backbone", remedy="use the adapter's own backbone"
        )
    alphas: dict[str, float] = {}
    for module, alpha in parts[_ALPHA].items():
        if alpha.numel() != 1:
            raise UserError(f"{source}: {module}: alpha has shape {list(alpha.shape)}; a single number is needed")
        alphas[module] = float(alpha)
    return assemble_pairs(source, parts[_DOWN], parts[_UP], alphas)


def _names(module: str, xl: Mapping[str, Any] | None) -> set[str]:
    if xl is None:
        return {name_of(module)}
    component, _, path = module.partition(".")
    return {name_of(module, xl), _XL_PREFIXES[component] + path.replace(".", "_")}


def _training_fields(weights: LoRAWeights, spec: ModelSpec) -> dict[str, str]:
    """kohya's ``ss_`` fields. Its ``conv_dim`` and ``conv_alpha`` speak of kernels larger than 1x1 alone."""
    spatial = {module for module, (down, _) in weights.pairs.items() if down[0].numel() > down.shape[1]}
    alpha = _one_of({float(alpha) for alpha in weights.uniform().alphas.values()})
    arguments = {}
    if spatial:
        arguments = {"conv_dim": _one_of({weights.rank(module) for module in spatial}), "conv_alpha": alpha}
    return {
        "ss_v2": str(spec.architecture.startswith("stable-diffusion-v2")),
        "ss_base_model_version": _VERSIONS[spec.architecture] + ("_v" if _velocity(spec) else ""),
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one_of({weights.rank(module) for module in weights.pairs.keys() - spatial or spatial}),
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments),
        "ss_output_name": spec.title,
        "ss_steps": str(spec.steps),
        "ss_seed": str(spec.seed),
    }


def _velocity(spec: ModelSpec) -> bool:
    return spec.prediction_type == "v" and spec.architecture != XL


def _one_of(values: set[int] | set[float]) -> str:
    """The only value, or kohya's word for several."""
    return str(next(iter(values))) if len(values) == 1 else "Dynamic"


def _hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The fields by which A1111 knows a file again though its metadata were edited.

    Both are taken of the file as it would be with the ``ss_`` metadata alone: the SHA-256 of what follows the header,
    and, by the older rule, the first 8 hex digits of that of the 64 KiB at 1 MiB (nothing, in a smaller file).
    Source: kohya-ss/sd-scripts, library/train_util.py, ``precalculate_safetensors_hashes``.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    file = safetensors.torch.save(dict(tensors), training)
    body = 8 + int.from_bytes(file[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(file)[body:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8],
    }
