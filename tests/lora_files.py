"""LoRA files with random weights: write and read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from sdtune.backbone import Pretrained
from sdtune.backbone.families import SD1
from sdtune.backbone.layers import module_path
from sdtune.formats import KohyaTable, LoRAWeights, ModelSpec, diffusers_lora, kohya_lora
from sdtune.formats.files import read_safetensors


def lora(base: Path, folder: Path, rank: int = 4) -> Path:
    """Write a LoRA with random weights for the pipeline ``base`` in the diffusers format."""
    backbone, rng = Pretrained(str(base)).load(), torch.Generator().manual_seed(3)
    pairs = {}
    for component in ("denoiser", *backbone.encoders):
        for name, module in getattr(backbone, component).named_modules():
            if name.endswith(("attn2.to_q", "attn1.to_out.0", "q_proj", "resnets.0.conv1")):
                out_features, in_shape = module.weight.shape[0], module.weight.shape[1:]
                down = torch.randn(rank, *in_shape, generator=rng) / 8
                pairs[module_path(backbone, component, name)] = (
                    down,
                    torch.randn(out_features, rank, *[1] * (len(in_shape) - 1), generator=rng),
                )
    weights = LoRAWeights(pairs, dict.fromkeys(pairs, 2.0))
    diffusers_lora.write(folder / diffusers_lora.FILE_NAME, weights, {})
    return folder / diffusers_lora.FILE_NAME


def read_diffusers(path: Path) -> LoRAWeights:
    """Read the weights of a file in the diffusers format."""
    return diffusers_lora.parse(path, *read_safetensors(path))


def sd1_table(modules: Collection[str]) -> KohyaTable:
    """kohya's names of the ``modules`` of SD 1.x."""
    return SD1.kohya_table(modules, {})


def write_kohya(path: Path, weights: LoRAWeights, spec: ModelSpec, metadata: Mapping[str, str]) -> None:
    """Write the weights of a LoRA of SD 1.x in the kohya format."""
    kohya_lora.write(path, weights, spec, metadata, sd1_table(weights.pairs))


def read_kohya(path: Path, modules: Collection[str]) -> LoRAWeights:
    """Read the weights of a file of SD 1.x in the kohya format."""
    tensors, _ = read_safetensors(path)
    return kohya_lora.parse(path, tensors, sd1_table(modules))
