"""Checkpoints: the last two and the best are kept, and writes are atomic."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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


@pytest.mark.parametrize("stop", [2, 4])
def test_stop_in_a_validation_aborts_it_and_the_resumed_run_repeats_it(
    tiny: Path, images: Path, tmp_path: Path, stop: int
) -> None:
    overrides = ["data.hold_out=5", "data.batch_size=2", "trainer.val_check_interval=2", "trainer.max_steps=4"]
    overrides += [
        "callbacks.ema={_target_: sdtune.callbacks.EMA, decay: 0.5}",
        "callbacks.early_stopping={_target_: sdtune.callbacks.EarlyStopping, patience: 3}",
    ]
    assert train(*arguments(tiny, images, tmp_path / "whole", *overrides)) == 0
    run = tmp_path / "stopped"
    batches = tmp_path / "batches.txt"
    callback = f"+callbacks.stop={{_target_: running.StopInValidation, step: {stop}, file: {batches}}}"
    overrides += ["logger=tensorboard"]
    assert train(*arguments(tiny, images, run, *overrides, "trust=[running]", callback)) == 128 + signal.SIGTERM
    assert batches.read_text(encoding="utf-8").split().count(str(stop)) == 1  # of four
    assert not [row for row in rows(run) if row["validation_loss"] and int(row["step"]) == stop]
    assert last_checkpoint(run).name == f"step{stop:08d}.ckpt"
    assert train(f"resume={run}") == 0
    assert batches.read_text(encoding="utf-8").split().count(str(stop)) == 1 + 4
    assert (run / "metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
    for file in ("images.safetensors", "images-best.safetensors"):
        one, other = (load_file(folder / "artifact" / file) for folder in (run, tmp_path / "whole"))
        assert all(torch.equal(one[key], other[key]) for key in one | other)
    assert (run / "checkpoints/best.ckpt").is_file()
    logged = [(event.step, event.value) for event in _logged(run, "validation_loss")]
    expected = [(int(row["step"]), float(row["validation_loss"])) for row in rows(run) if row["validation_loss"]]
    assert logged == [(step, pytest.approx(value)) for step, value in expected]


def _logged(run: Path, name: str) -> list[Any]:
    """The values of ``name`` in TensorBoard's files of ``run``, of all its starts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted({file.parent for file in run.rglob("events.out.*")})
    events = []
    for folder in folders:
        accumulator = EventAccumulator(str(folder))
        accumulator.Reload()
        events += accumulator.Scalars(name) if name in accumulator.Tags()["scalars"] else []
    return sorted(events, key=lambda event: event.wall_time)


def test_resumed_run_writes_the_columns_of_its_steps_to_a_new_table(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["data.hold_out=5", "data.batch_size=2", "trainer.val_check_interval=2", "trainer.max_steps=4"]
    callback = f"+callbacks.stop={{_target_: running.StopInValidation, step: 2, file: {tmp_path}/batches.txt}}"
    assert train(*arguments(tiny, images, run, *overrides, "trust=[running]", callback)) == 128 + signal.SIGTERM
    columns = list(rows(run)[0])
    (run / "metrics.csv").unlink()
    assert train(f"resume={run}") == 0
    assert list(rows(run)[0]) == columns
    assert [row["step"] for row in rows(run)] == ["2", "3", "4", "4"]


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


@pytest.mark.parametrize(("parameters", "interval"), [(1000, 100), (2 * 2**30 // 12 + 1, 500)])
def test_default_interval_depends_on_the_size_of_a_checkpoint(parameters: int, interval: int, tmp_path: Path) -> None:
    module = torch.nn.Linear(1, parameters, bias=False, device="meta")
    checkpoints = Checkpoints(tmp_path, MetricsRecorder(tmp_path))
    assert checkpoints._default_interval(module) == interval  # type: ignore[arg-type]
