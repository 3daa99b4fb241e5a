"""LoRA files: of random weights, and read again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from sdtune.backbone import Pretrained
from sdtune.formats import LoRAWeights, canonical, diffusers_lora, kohya_lora
from sdtune.formats.files import read_safetensors


def lora(base: Path, folder: Path, rank: int = 4) -> Path:
    """A LoRA file for ``base``, of random weights, in diffusers' form."""
    backbone, rng = Pretrained(str(base)).load(), torch.Generator().manual_seed(3)
    pairs = {}
    for component in ("unet", *backbone.encoders):
        for name, module in getattr(backbone, component).named_modules():
            if name.endswith(("attn2.to_q", "attn1.to_out.0", "q_proj", "resnets.0.conv1")):
                out, inside = module.weight.shape[0], module.weight.shape[1:]
                down = torch.randn(rank, *inside, generator=rng) / 8
                pairs[canonical(f"{component}.{name}")] = (
                    down,
                    torch.randn(out, rank, *[1] * (len(inside) - 1), generator=rng),
                )
    weights = LoRAWeights(pairs, dict.fromkeys(pairs, 2.0))
    diffusers_lora.write(folder / diffusers_lora.FILE_NAME, weights, {})
    return folder / diffusers_lora.FILE_NAME


def read_diffusers(path: Path) -> LoRAWeights:
    """The weights of a file in diffusers' form."""
    return diffusers_lora.parse(path, *read_safetensors(path))


def read_kohya(path: Path, modules: Iterable[str]) -> LoRAWeights:
    """The weights of a file in kohya's form."""
    tensors, _ = read_safetensors(path)
    return kohya_lora.parse(path, tensors, modules)
