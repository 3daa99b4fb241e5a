"""Stopping at the lowest validation loss, and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from running import adamw, arguments, fit, folder_data, rows, train
from sdtune.backbone import Pretrained
from sdtune.callbacks import EarlyStopping
from sdtune.errors import UserError
from sdtune.methods import LoRA


def test_the_best_steps_files_are_written_and_the_run_stops(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    common = ["name=mine", "trainer.max_steps=60", "data.hold_out=5", "trainer.val_check_interval=2"]
    common += ["optimizer.lr=1.0", "callbacks=early_stopping", "callbacks.early_stopping.patience=2"]
    assert train(*arguments(tiny, images, run, *common)) == 0
    values = {int(r["step"]): float(r["validation_loss"]) for r in rows(run) if r["validation_loss"]}
    best, last = min(values, key=values.__getitem__), max(values)
    assert last == best + 4 < 60, values
    assert (run / "checkpoints" / f"step{last:08d}.ckpt").exists()
    kept = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert kept["global_step"] == best

    files = {name: load_file(run / "artifact" / f"{name}.safetensors") for name in ("mine", "mine-best")}
    downs = {k: v for k, v in kept["state_dict"].items() if "lora_A" in k}
    for key, value in downs.items():
        name = key.removeprefix("backbone.").replace(".lora_A.default.weight", "").replace(".", "_")
        found = files["mine-best"][f"lora_{name}.lora_down.weight"]
        assert torch.equal(found, value)
    assert any(not torch.equal(v, files["mine"][k]) for k, v in files["mine-best"].items())


def test_the_best_of_an_average_is_the_average(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    common = ["name=mine", "trainer.max_steps=4", "data.hold_out=5", "trainer.val_check_interval=4"]
    assert train(*arguments(tiny, images, run, *common, "callbacks=ema", "callbacks.samples=null")) == 0
    best, last = (load_file(run / "artifact" / f"{name}.safetensors") for name in ("mine-best", "mine"))
    for key, value in last.items():
        assert torch.equal(best[key], value)


def test_a_run_shorter_than_the_interval_is_measured_at_its_end(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = ["name=mine", "trainer.max_steps=3", "data.hold_out=5", "trainer.accumulate_grad_batches=2"]
    assert train(*arguments(tiny, images, run, *own, "callbacks.samples=null")) == 0
    assert [r["step"] for r in rows(run) if r["validation_loss"]] == ["3"]
    assert (run / "artifact" / "mine-best.safetensors").is_file()


def test_stopping_needs_something_held_out(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(*arguments(tiny, images, run, "callbacks=early_stopping", "callbacks.samples=null")) == 2
    assert "callbacks.early_stopping: no image is held out" in capsys.readouterr().err
    assert not run.exists()


def test_without_hydra_too(tiny: Path, images: Path) -> None:
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3))
    fit(model, folder_data(images, hold_out=2), 1, [EarlyStopping()], val_check_interval=1)
    with pytest.raises(UserError, match=r"^callbacks\.early_stopping: no image is held out"):
        fit(LoRA(rank=2, backbone=Pretrained(str(tiny))), folder_data(images), 1, [EarlyStopping()])
