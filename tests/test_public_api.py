"""Public names, and use from Python without Hydra as in the README."""

from __future__ import annotations

import importlib
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
    "sdtune": {"TrainedRun", "plan", "pocket", "sample", "train"},
    "sdtune.backbone": {"Component", "Facts", "Pretrained"},
    "sdtune.callbacks": {"EMA", "Checkpoints", "EarlyStopping", "Pruning", "Samples"},
    "sdtune.data": {"Batch", "CacheInputs", "Folder", "ImageDataModule", "Mix", "Sample", "Table"},
    "sdtune.methods": {"Adapter", "ControlNet", "DreamBooth", "Full", "LoRA", "TextualInversion"},
    "sdtune.objective": {
        "DDPMPath",
        "FlowPath",
        "MinSNR",
        "NoiseSchedule",
        "Objective",
        "PredictionType",
        "ProbabilityPath",
        "Timesteps",
        "Uniform",
        "Weighting",
    },
    "sdtune.sampling": {"Request", "Sampling", "generate", "sample"},
}
"""Public names that programs may import. Change this list only on purpose, with a line in CHANGELOG.md."""


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_unchanged(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == PUBLIC[package]
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_package_has_a_py_typed_file() -> None:
    assert (Path(sdtune.__file__).parent / "py.typed").is_file()


def test_training_and_sampling_from_plain_python(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_validation_works_with_default_trainer_arguments(tiny: Path, images: Path) -> None:
    model = LoRA(rank=1, backbone=Pretrained(str(tiny)))
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, datamodule=Folder(path=str(images), batch_size=2, hold_out=5))
    assert 0 < float(trainer.callback_metrics["validation_loss"]) < 10
