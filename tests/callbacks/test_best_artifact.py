"""Early stopping on the validation loss, and the files of the best step."""

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


def test_early_stopping_ends_the_run_and_the_best_artifact_is_written(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["name=mine", "trainer.max_steps=60", "data.hold_out=5", "trainer.val_check_interval=2"]
    overrides += ["optimizer.lr=1.0", "callbacks=early_stopping", "callbacks.early_stopping.patience=2"]
    assert train(*arguments(tiny, images, run, *overrides)) == 0
    values = {int(r["step"]): float(r["validation_loss"]) for r in rows(run) if r["validation_loss"]}
    best, last = min(values, key=values.__getitem__), max(values)
    assert last == best + 4 < 60, values
    assert (run / "checkpoints" / f"step{last:08d}.ckpt").exists()
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == best

    files = {name: load_file(run / "artifact" / f"{name}.safetensors") for name in ("mine", "mine-best")}
    downs = {k: v for k, v in checkpoint["state_dict"].items() if "lora_A" in k}
    for key, value in downs.items():
        name = key.removeprefix("backbone.denoiser.").replace(".lora_A.default.weight", "").replace(".", "_")
        exported = files["mine-best"][f"lora_unet_{name}.lora_down.weight"]
        assert torch.equal(exported, value)
    assert any(not torch.equal(v, files["mine"][k]) for k, v in files["mine-best"].items())


def test_best_artifact_of_a_run_with_ema_has_the_averaged_weights(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["name=mine", "trainer.max_steps=4", "data.hold_out=5", "trainer.val_check_interval=4"]
    assert train(*arguments(tiny, images, run, *overrides, "callbacks=ema", "callbacks.samples=null")) == 0
    best, last = (load_file(run / "artifact" / f"{name}.safetensors") for name in ("mine-best", "mine"))
    for key, value in last.items():
        assert torch.equal(best[key], value)


def test_run_shorter_than_the_validation_interval_is_validated_at_its_end(
    tiny: Path, images: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overrides = ["name=mine", "trainer.max_steps=3", "data.hold_out=5", "trainer.accumulate_grad_batches=2"]
    assert train(*arguments(tiny, images, run, *overrides, "callbacks.samples=null")) == 0
    assert [r["step"] for r in rows(run) if r["validation_loss"]] == ["3"]
    assert (run / "artifact" / "mine-best.safetensors").is_file()


def test_early_stopping_without_validation_set_is_refused(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(*arguments(tiny, images, run, "callbacks=early_stopping", "callbacks.samples=null")) == 2
    assert "callbacks.early_stopping: no image is held out" in capsys.readouterr().err
    assert not run.exists()


def test_early_stopping_works_without_hydra(tiny: Path, images: Path) -> None:
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3))
    fit(model, folder_data(images, hold_out=2), 1, [EarlyStopping()], val_check_interval=1)
    with pytest.raises(UserError, match=r"^callbacks\.early_stopping: no image is held out"):
        fit(LoRA(rank=2, backbone=Pretrained(str(tiny))), folder_data(images), 1, [EarlyStopping()])
