"""DDP with two processes computes the same as one process with the same global batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from running import arguments, rows, start, train, wait_for_step
from sdtune.quoting import override


def _processes_with(text: str) -> list[str]:
    """Command lines of running processes that contain ``text``."""
    command_lines = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # the process has ended
        if text in line and entry.name != str(os.getpid()):
            command_lines.append(line)
    return command_lines


def _on_two_processes(overrides: list[str]) -> list[str]:
    """``overrides`` with DDP on two CPU processes."""
    others = [argument for argument in overrides if argument != "hardware=cpu"]
    return [*others, "hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2"]


def test_two_processes_compute_the_same_as_one(tiny: Path, images: Path, tmp_path: Path) -> None:
    common = ["name=mine", "trainer.max_steps=10", "data.batch_size=4", "optimizer.lr=1e-3", "data.hold_out=5"]
    common += ["trainer.val_check_interval=5", "checkpoint.every_steps=5"]
    two, one, log = tmp_path / "two", tmp_path / "one", tmp_path / "two.log"
    process = start(log, *_on_two_processes(arguments(tiny, images, two, *common)))
    assert train(*arguments(tiny, images, one, *common)) == 0
    assert process.wait(timeout=280) == 0, log.read_text(encoding="utf-8")
    assert not _processes_with(str(two))

    rows_of_two, rows_of_one = rows(two), rows(one)
    assert [row["step"] for row in rows_of_two] == [row["step"] for row in rows_of_one]
    for column in ("loss", "grad_norm", "validation_loss"):
        pairs = [
            (float(a[column]), float(b[column])) for a, b in zip(rows_of_two, rows_of_one, strict=True) if b[column]
        ]
        assert pairs
        tolerance = 1e-5 if column != "grad_norm" else 1e-3
        assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=tolerance)

    files = {str(path.relative_to(two)) for path in two.rglob("*") if path.is_file()}
    expected_files = {str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()}
    assert files - expected_files <= {"train_ddp_process_1.log"}
    assert expected_files <= files
    ddp_weights, weights = (load_file(run / "artifact" / "mine.safetensors") for run in (two, one))
    for key, value in ddp_weights.items():
        difference = torch.linalg.norm((value - weights[key]).float())
        assert difference <= 1e-3 * torch.linalg.norm(weights[key].float()) + 1e-7
    assert log.read_text(encoding="utf-8").count("captions: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, 10])
def test_validation_that_a_stop_of_one_process_aborts_is_repeated(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    common = ["name=mine", "trainer.max_steps=10", "data.batch_size=4", "data.hold_out=5"]
    common += ["trainer.val_check_interval=5", "trainer.log_every_n_steps=3"]
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert start(log, *_on_two_processes(arguments(tiny, images, whole, *common))).wait(280) == 0
    callback = f"+callbacks.stop={{_target_: running.StopInValidation, step: {stop}, file: {tmp_path}/batches.txt}}"
    overrides = _on_two_processes(arguments(tiny, images, run, *common, "trust=[running]", callback))
    assert start(log, *overrides).wait(280) == 128 + signal.SIGTERM, log.read_text(encoding="utf-8")
    assert start(log, f"resume={run}").wait(280) == 0, log.read_text(encoding="utf-8")
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    one, other = (load_file(folder / "artifact" / "mine.safetensors") for folder in (run, whole))
    assert all(torch.equal(one[key], other[key]) for key in one | other)


@pytest.mark.slow
def test_both_processes_use_hardware_threads_and_write_to_a_folder_with_special_characters(
    tiny: Path, images: Path, tmp_path: Path
) -> None:
    run = tmp_path / "it's [1,2] a=b"
    overrides = [
        word for word in arguments(tiny, images, run, "trainer.max_steps=1") if not word.startswith("hydra.run")
    ]
    overrides += ["hardware.threads=3", "trust=[running]", "+callbacks.threads._target_=running.Threads"]
    overrides += [override("+callbacks.threads.place", tmp_path), override("hydra.run.dir", run)]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "sdtune", "train", *_on_two_processes(overrides)],
        env={**environment, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"{rank}.threads").read_text(encoding="utf-8") for rank in (0, 1)] == ["3", "3"]
    assert len(rows(run)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {run.name, images.name, "0.threads", "1.threads"}


@pytest.mark.slow
def test_two_processes_stop_and_save_at_sigterm(tiny: Path, images: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "run.log"
    common = ["name=mine", "trainer.max_steps=100000", "data.batch_size=4", "checkpoint.every_steps=100000"]
    process = start(log, *_on_two_processes(arguments(tiny, images, run, *common)))
    wait_for_step(process, run, 3, log)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=200) == 143, log.read_text(encoding="utf-8")
    assert not _processes_with(str(run))
    assert (
        log.read_text(encoding="utf-8").splitlines()[-1].startswith(f"sdtune: stopped at step {rows(run)[-1]['step']};")
    )
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step{int(rows(run)[-1]['step']):08d}.ckpt"]
    assert (run / "artifact" / "mine.safetensors").exists()


@pytest.mark.slow
def test_torchrun_can_start_a_training(tiny: Path, images: Path, tmp_path: Path) -> None:
    run, one = tmp_path / "run", tmp_path / "one"
    common = ["name=mine", "trainer.max_steps=3", "data.batch_size=4", "optimizer.lr=1e-3"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533"]
    overrides = _on_two_processes(arguments(tiny, images, run, *common))
    done = subprocess.run(
        [*launch, "-m", "sdtune", "train", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "metrics.json").is_file()
    assert train(*arguments(tiny, images, one, *common)) == 0
    assert [float(r["loss"]) for r in rows(run)] == pytest.approx([float(r["loss"]) for r in rows(one)], rel=1e-5)


TWO_SOURCES = [
    *("data=mix", "data.sources.a.path={images}", "data.sources.a.hold_out=5", "data.sources.a.weight=0.7"),
    *("data.sources.b.path={images}", "data.sources.b.hold_out=3", "data.sources.b.loss_weight=0.5"),
    *("data.sources.b.captions.kind=tags", "data.sources.b.captions.shuffle=true", "data.resolution=[32,64]"),
    "data.sources.b.captions.suffix=', a, b, c, d'",
]


@pytest.mark.slow
def test_two_processes_train_on_a_mix_as_one(tiny: Path, images: Path, tmp_path: Path) -> None:
    """Shuffled tags, weights, loss weights, several resolutions and losses of each source."""
    mix = [text.replace("{images}", str(images)) for text in TWO_SOURCES]
    common = ["name=mine", "trainer.max_steps=60", "data.batch_size=4", "optimizer.lr=1e-4", *mix]
    common += ["trainer.val_check_interval=10", "checkpoint.every_steps=30"]

    def overrides(run: Path) -> list[str]:
        return [a for a in arguments(tiny, images, run, *common) if not a.startswith(("data=folder", "data.path"))]

    two, one, log = tmp_path / "two", tmp_path / "one", tmp_path / "two.log"
    process = start(log, *_on_two_processes(overrides(two)))
    assert train(*overrides(one)) == 0
    assert process.wait(timeout=280) == 0, log.read_text(encoding="utf-8")
    rows_of_two, rows_of_one = rows(two), rows(one)
    columns = [name for name in rows_of_one[0] if name.startswith(("loss", "validation_loss"))]
    assert {"loss/source/a", "loss/source/b", "validation_loss/source/a", "validation_loss/source/b"} <= {*columns}
    largest = 0.0
    for row, other in zip(rows_of_two, rows_of_one, strict=True):
        assert row["step"] == other["step"]
        for column in columns:
            assert (row[column] == "") == (other[column] == ""), (column, row["step"])
            if row[column]:
                difference = abs(float(row[column]) / float(other[column]) - 1)
                largest = max(largest, difference)
                assert difference <= (1e-5 if int(row["step"]) <= 20 else 1e-2), (column, row["step"], difference)
    print(f"largest relative difference over 60 steps: {largest:.2g}")
