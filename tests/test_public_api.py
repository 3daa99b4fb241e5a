"""The README's few lines of plain Python: no Hydra, no config, no ceremony."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import running  # noqa: F401
import sdtune
from sdtune.backbone import Pretrained
from sdtune.data import Folder
from sdtune.methods import LoRA
from sdtune.sampling.loop import Sampling

PUBLIC = {
    "sdtune": {"pocket", "sample"},
    "sdtune.backbone": {"Component", "Facts", "Pretrained"},
    "sdtune.callbacks": {"EMA", "Checkpoints", "EarlyStopping", "Pruning", "Samples"},
    "sdtune.data": {"Batch", "Encoders", "Folder", "ImageDataModule", "Sample"},
    "sdtune.methods": {"Adapter", "ControlNet", "DreamBooth", "Full", "LoRA", "TextualInversion"},
    "sdtune.objective": {
        "MinSNR",
        "NoiseSchedule",
        "Objective",
        "PredictionType",
        "Uniform",
        "Weighting",
        "target",
    },
    "sdtune.sampling": {"Request", "Sampling", "generate", "sample"},
}
"""What programs may import and count on; a name is added or dropped here on purpose, with a line in CHANGELOG.md."""


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == PUBLIC[package]
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_the_package_is_typed() -> None:
    assert (Path(sdtune.__file__).parent / "py.typed").is_file()


def test_plain_python(tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = Pretrained(str(tiny))
    model = LoRA(rank=4, backbone=backbone)
    trainer = pl.Trainer(max_steps=4, logger=False, accelerator="cpu")
    trainer.fit(model, datamodule=Folder(path=str(images), batch_size=2))
    assert trainer.global_step == 4
    model.artifact(Path("otter"), "otter")
    assert sorted(p.name for p in Path("otter").iterdir()) == ["otter.safetensors", "pytorch_lora_weights.safetensors"]
    assert any(bool(torch.any(up)) for _, up in model.weights().pairs.values())

    few = Sampling(steps=2, guidance=3.0)
    adapter = {"path": "otter/otter.safetensors", "strength": 20.0}
    [image] = sdtune.sample("a photo of an otter", adapters=[adapter], backbone=backbone, sampling=few)
    [base] = sdtune.sample("a photo of an otter", backbone=backbone, sampling=few)
    assert image.size == (32, 32)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(base)).max() > 0


def test_the_readmes_lines_run(tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but on the tiny backbone and for two steps."""
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    [lines] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    for old, new in (
        ('Pretrained("pocket")', f'Pretrained("{tiny}")'),
        ('path="DIR"', f'path="{images}"'),
        ("max_steps=400", "max_steps=2"),
        ("sdtune.sample(", f'sdtune.sample(backbone=Pretrained("{tiny}"), prompt='),
    ):
        assert old in lines
        lines = lines.replace(old, new)
    exec(compile(lines, "README.md", "exec"), {})
    assert {p.name for p in tmp_path.iterdir()} >= {"otter", "otter.png"}


def test_validation_by_lightnings_defaults(tiny: Path, images: Path) -> None:
    model = LoRA(rank=1, backbone=Pretrained(str(tiny)))
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, datamodule=Folder(path=str(images), batch_size=2, hold_out=5))
    assert 0 < float(trainer.callback_metrics["validation_loss"]) < 10
