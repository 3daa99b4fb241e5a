"""Every optimizer of the group trains a LoRA, and a step that is not finite reaches no weight."""

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
def test_it_trains_from_its_config(tiny: Path, images: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    assert train(*arguments(tiny, images, run, f"optimizer={name}", "trainer.max_steps=3")) == 0
    assert all(float(row["lr/unet"]) > 0 for row in rows(run))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_reaches_no_weight(tiny: Path, images: Path, name: str) -> None:
    node = plain(compose("train", search_path(None), [f"optimizer={name}"]))["optimizer"]
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=build(node))
    fit(model, folder_data(images), 3, [Poison(2)])
    assert all(torch.isfinite(p).all() for _, p in model.trainable())
    assert any(p.any() for n, p in model.trainable() if "lora_B" in n)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["experiment=sd15_lora"], "optimizer.lr: 0.0001 is a factor on the step size that Prodigy finds by itself"),
        (["method.text_encoder_lr=1e-5"], "method.text_encoder_lr: Prodigy has one rate for all"),
        (["tokens_lr=1e-3"], "tokens_lr: Prodigy has one rate for all"),
    ],
)
def test_prodigys_rate_is_a_factor_for_all(
    own: list[str], words: str, tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*own, "optimizer=prodigy"]
    assert train(*arguments(tiny, images, tmp_path / "run", *own)) == 2
    assert capsys.readouterr().err.startswith(f"sdtune: {words}")
