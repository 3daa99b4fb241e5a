"""Checkpoints: the last two and the best are kept, and writes are atomic."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from running import adamw, arguments, fit, folder_data, rows, train
from sdtune.backbone import Pretrained
from sdtune.callbacks.checkpoints import AtomicIO, Checkpoints, last_checkpoint
from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.methods import LoRA


def test_last_two_and_best_checkpoints_are_kept(tiny: Path, images: Path, tmp_path: Path) -> None:
    record = MetricsRecorder(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", record, every_steps=2)
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-2))
    fit(
        model,
        folder_data(images, hold_out=5),
        7,
        [record, checkpoints],
        plugins=[AtomicIO()],
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.ckpt", "step00000006.ckpt", "step00000007.ckpt"]
    assert last_checkpoint(tmp_path).name == "step00000007.ckpt"
    values = {int(row["step"]): float(row["validation_loss"]) for row in rows(tmp_path) if row["validation_loss"]}
    assert sorted(values) == list(range(1, 8))
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == min(values, key=values.__getitem__)


def test_checkpoints_are_saved_without_validation_set(tiny: Path, images: Path, tmp_path: Path) -> None:
    """At multiples of the validation interval, where Lightning skips a validation without images."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", MetricsRecorder(tmp_path), every_steps=2)
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-2))
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(model, folder_data(images), 4, [checkpoints.record, checkpoints], plugins=[AtomicIO()], **settings)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step00000002.ckpt", "step00000004.ckpt"]


class _FullDiskFile(io.RawIOBase):
    """File on a disk that is full after 100 bytes."""

    def __init__(self, path: Path) -> None:
        self.file, self.left = io.FileIO(path, "wb"), 100

    def write(self, data: Any) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


def test_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "step00000001.ckpt"
    AtomicIO().save_checkpoint({"value": torch.arange(3)}, target)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *_: _FullDiskFile(self))
        with pytest.raises(OSError, match="No space left"):
            AtomicIO().save_checkpoint({"value": torch.arange(3000)}, target)
    assert torch.load(target, weights_only=True)["value"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [target]


def test_resuming_a_complete_run_without_metrics_json_writes_it(tiny: Path, images: Path, tmp_path: Path) -> None:
    """The state after the process was killed during the evaluation."""
    run = tmp_path / "run"
    overrides = ["data.hold_out=5", "trainer.val_check_interval=3", "trainer.max_steps=3"]
    assert train(*arguments(tiny, images, run, *overrides)) == 0
    table = (run / "metrics.csv").read_text(encoding="utf-8")
    (run / "metrics.json").unlink()
    assert train(f"resume={run}") == 0
    assert (run / "metrics.csv").read_text(encoding="utf-8") == table
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["validation_loss"] == float(
        rows(run)[-1]["validation_loss"]
    )
    assert train(f"resume={run}") == 2  # the run is complete now
