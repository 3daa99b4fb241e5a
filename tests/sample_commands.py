"""Command lines of ``sdtune sample`` on the tiny backbone, a LoRA for it, and the generated files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdtune.backbone import Pretrained
from sdtune.formats import LoRAWeights
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.formats.diffusers_lora import write as write_diffusers

FEW = ["hardware=cpu", "sampling.steps=2", "sampling.guidance=3.0"]


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of two modules, strong enough to change images visibly."""
    rng = torch.Generator().manual_seed(1)
    pairs = {
        f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.attn2.to_out.0": (
            torch.randn(2, width, generator=rng),
            torch.randn(width, 2, generator=rng),
        )
        for i, width in enumerate((16, 32))
    }
    file = tmp_path_factory.mktemp("adapter") / FILE_NAME
    hash_of = {"sdtune_backbone_hash": Pretrained(str(tiny)).hash()}
    write_diffusers(file, LoRAWeights(pairs, dict.fromkeys(pairs, 2.0)), hash_of)
    return file


def command(tiny: Path, folder: Path, *more: str) -> list[str]:
    return ["backbone=sd15", f"backbone.path={tiny}", *FEW, f"hydra.run.dir={folder}", *more]


def images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.png") if p.name != "grid.png")
