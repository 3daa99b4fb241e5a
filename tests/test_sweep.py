"""Sweeps: checked before they start, jobs that fail, what is missing run again, several devices a job."""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path

import pytest

from running import arguments, rows, start, train, wait_for_step
from sdtune.methods.base import Adapter


@pytest.fixture
def settings(tiny: Path, pictures: Path, tmp_path: Path) -> list[str]:
    own = arguments(tiny, pictures, tmp_path, "name=mine", "trainer.max_steps=3", f"hydra.sweep.dir={tmp_path}/sweep")
    return ["-m", *(a for a in own if not a.startswith(("hydra.run.dir", "method.rank")))]


def states(sweep: Path) -> dict[str, str]:
    return {job["job"]: job["state"] for job in json.loads((sweep / "sweep.json").read_text())["jobs"]}


def ages(sweep: Path) -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in sweep.glob("*/metrics.json")}


def test_all_jobs_are_checked_before_the_first_starts(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*settings, "method.rank=2,0,-1") == 2
    said = capsys.readouterr().err
    assert said.startswith("sdtune: job 1 (")
    assert "job 1 (method.rank=0): method.rank: 0: input should be greater than or equal to 1" in said
    assert said.endswith("(and 1 more of its jobs); nothing was started\n")
    assert said.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_a_job_that_fails_is_named_and_the_others_run_on(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    # A rate at which the second step's loss is not a number any more.
    assert train(*settings, "method.rank=2", "optimizer.lr=1e-3,1e30,1e-4") == 1
    said = capsys.readouterr()
    assert f"sweep: 2 of 3 jobs are done: {sweep}" in said.out
    last = [line for line in said.err.splitlines() if line.startswith("sdtune: job 1 (")]
    assert len(last) == 1
    assert "(optimizer.lr=1e+30) failed: step 2: the loss or its gradient is not finite" in last[0]
    assert said.err.splitlines()[-1] == f"sdtune: sdtune train -m resume={sweep} runs them again"
    assert states(sweep) == {"0": "done", "1": "failed", "2": "done"}
    assert [len(rows(sweep / job)) for job in ("0", "2")] == [3, 3]
    rates = [float(rows(sweep / job)[-1]["lr/unet"]) for job in ("0", "2")]
    assert rates == [pytest.approx(1e-3), pytest.approx(1e-4)]


def test_no_job_leaves_its_model_in_memory(settings: list[str]) -> None:
    gc.collect()
    gc.disable()
    try:
        assert train(*settings, "method.rank=1,2") == 0
        assert not [found for found in gc.get_objects() if isinstance(found, Adapter)]
    finally:
        gc.enable()


def test_resumed_only_what_is_missing_runs(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    own = [*settings, "method.rank=2,3,4", "checkpoint.every_steps=2"]
    assert train(*own) == 0
    whole = {job: rows(sweep / job) for job in ("0", "1", "2")}
    before = ages(sweep)
    # One was killed after its second step, one before its first.
    (sweep / "1" / "metrics.json").unlink()
    (sweep / "1" / "checkpoints" / "step00000003.ckpt").unlink()
    (sweep / "2" / "metrics.json").unlink()
    for file in (sweep / "2" / "checkpoints").iterdir():
        file.unlink()

    assert train(*own) == 2
    assert f"hydra.sweep.dir: {sweep} already holds a sweep; resume={sweep} goes on with it" in capsys.readouterr().err
    assert train(*own, "optimizer.lr=1", f"resume={sweep}") == 2
    assert "resume: optimizer.lr=1 makes it another sweep" in capsys.readouterr().err
    assert ages(sweep) == {"0": before["0"]}

    assert train(*own, f"resume={sweep}") == 0
    said = capsys.readouterr().out
    assert said.count("resuming at step 2 from") == 1
    assert {job: rows(sweep / job) for job in whole} == whole
    after = ages(sweep)
    assert after["0"] == before["0"]
    assert after.keys() == before.keys()
    assert states(sweep) == {"0": "done", "1": "done", "2": "done"}
    assert train("-m", f"resume={sweep}") == 0  # its own overrides need not be repeated
    assert ages(sweep) == after


def test_an_edited_recipe_is_noticed(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    recipe = tmp_path / "conf" / "experiment" / "mine.yaml"
    recipe.write_text("# @package _global_\noptimizer:\n  lr: 1e-3\n")
    own = ["-cd", str(tmp_path / "conf"), *settings, "experiment=mine", "method.rank=2,3"]
    assert train(*own) == 0
    recipe.write_text("# @package _global_\noptimizer:\n  lr: 1e-4\n")
    capsys.readouterr()
    assert train(*own, f"resume={tmp_path}/sweep") == 2
    assert "resume: optimizer.lr is 0.0001 now and was 0.001 when the run began" in capsys.readouterr().err


def test_no_sweep_to_resume(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("-m", f"resume={tmp_path}") == 2
    assert f"resume: {tmp_path} holds no sweep (no multirun.yaml)" in capsys.readouterr().err


def test_stopped_it_says_how_to_go_on(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = [a for a in settings if not a.startswith("trainer.max_steps")]
    own += ["trainer.max_steps=100000,4", "checkpoint.every_steps=100000"]
    process = start(log, *own)
    wait_for_step(process, sweep / "0", 3, log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=200) == 130, log.read_text()
    assert (
        log.read_text().splitlines()[-1]
        == f"sdtune: the sweep is stopped; sdtune train -m resume={sweep} goes on with it"
    )
    assert len(list((sweep / "0" / "checkpoints").glob("step*.ckpt"))) == 1
    assert json.loads((sweep / "0" / "job.json").read_text())["state"] == "stopped"
    assert not (sweep / "1").exists()


def test_each_job_of_two_devices_trains_its_own_rate_on_both(settings: list[str], tmp_path: Path) -> None:
    """Lightning's further processes repeat a command line; a sweep's would be a sweep again (and was)."""
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = [a for a in settings if a != "hardware=cpu"]
    own += ["hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2", "data.batch_size=4", "method.rank=2"]
    process = start(log, *own, "optimizer.lr=1e-3,1e-4")
    assert process.wait(timeout=280) == 0, log.read_text()
    for job, rate in (("0", 1e-3), ("1", 1e-4)):
        assert [float(r["lr/unet"]) for r in rows(sweep / job)] == [pytest.approx(rate)] * 3
        assert json.loads((sweep / job / "metrics.json").read_text())["steps"] == 3
        ranks = sorted((sweep / job).glob("train*.log"))
        assert len(ranks) == 2, "each rank has a log"
        assert all(f"optimizer.lr {rate}" in file.read_text() for file in ranks)
    assert states(sweep) == {"0": "done", "1": "done"}


def test_a_job_of_two_devices_that_fails_leaves_the_others(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = [*settings, "hardware.strategy=ddp", "hardware.devices=2,1", "data.batch_size=4", "optimizer.lr=1e30"]
    process = start(log, *own, "method.rank=2")
    assert process.wait(timeout=280) == 1, log.read_text()
    assert states(sweep) == {"0": "failed", "1": "failed"}
    errors = [json.loads((sweep / job / "job.json").read_text())["error"] for job in ("0", "1")]
    assert all(error.startswith("step 2: the loss or its gradient is not finite") for error in errors)
