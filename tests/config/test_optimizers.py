"""Every optimizer of the config group trains a LoRA, and a non-finite step changes no weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from running import Poison, arguments, fit, folder_data, rows, train
from sdtune.backbone import Pretrained
from sdtune.config.build import build
from sdtune.config.compose import compose, search_path
from sdtune.config.settings import plain
from sdtune.methods import LoRA
from sdtune.paths import config_folder

NAMES = sorted(path.stem for path in (config_folder() / "optimizer").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_trains_from_its_config(tiny: Path, images: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    assert train(*arguments(tiny, images, run, f"optimizer={name}", "trainer.max_steps=3")) == 0
    assert all(float(row["lr/denoiser"]) > 0 for row in rows(run))


@pytest.mark.parametrize("name", NAMES)
def test_non_finite_step_changes_no_weight(tiny: Path, images: Path, name: str) -> None:
    node = plain(compose("train", search_path(None), [f"optimizer={name}"]))["optimizer"]
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=build(node))
    fit(model, folder_data(images), 3, [Poison(2)])
    assert all(torch.isfinite(p).all() for _, p in model.trainable())
    assert any(p.any() for n, p in model.trainable() if "lora_B" in n)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=sd15_lora"], "optimizer.lr: Prodigy estimates the step size and expects lr=1.0, got 0.0001"),
        (["method.text_encoder_lr=1e-5"], "method.text_encoder_lr: Prodigy uses one learning rate for all"),
        (["tokens_lr=1e-3"], "tokens_lr: Prodigy uses one learning rate for all"),
    ],
)
def test_prodigy_refuses_a_small_or_separate_learning_rate(
    overrides: list[str], words: str, tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*overrides, "optimizer=prodigy"]
    assert train(*arguments(tiny, images, tmp_path / "run", *overrides)) == 2
    assert capsys.readouterr().err.startswith(f"sdtune: {words}")
