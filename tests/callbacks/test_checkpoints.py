"""Which checkpoints are kept, and that one is written whole or not at all."""

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


def test_the_last_two_and_the_best_are_kept(tiny: Path, images: Path, tmp_path: Path) -> None:
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


def test_without_held_out_images_no_validation_is_waited_for(tiny: Path, images: Path, tmp_path: Path) -> None:
    """At steps that are multiples of the interval: Lightning passes over a validation that has no images."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", MetricsRecorder(tmp_path), every_steps=2)
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-2))
    own = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(model, folder_data(images), 4, [checkpoints.record, checkpoints], plugins=[AtomicIO()], **own)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step00000002.ckpt", "step00000004.ckpt"]


class _Full(io.RawIOBase):
    """A file on a disk that is full after some bytes."""

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


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "step00000001.ckpt"
    AtomicIO().save_checkpoint({"value": torch.arange(3)}, target)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *_: _Full(self))
        with pytest.raises(OSError, match="No space left"):
            AtomicIO().save_checkpoint({"value": torch.arange(3000)}, target)
    assert torch.load(target, weights_only=True)["value"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [target]


def test_a_complete_run_whose_figures_are_missing_goes_on_to_make_them(
    tiny: Path, images: Path, tmp_path: Path
) -> None:
    """As after a kill in the middle of the evaluation."""
    run = tmp_path / "run"
    own = ["data.hold_out=5", "trainer.val_check_interval=3", "trainer.max_steps=3"]
    assert train(*arguments(tiny, images, run, *own)) == 0
    table = (run / "metrics.csv").read_text()
    (run / "metrics.json").unlink()
    assert train(f"resume={run}") == 0
    assert (run / "metrics.csv").read_text() == table
    assert json.loads((run / "metrics.json").read_text())["validation_loss"] == float(rows(run)[-1]["validation_loss"])
    assert train(f"resume={run}") == 2  # now it is complete
