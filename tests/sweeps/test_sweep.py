"""Sweeps: checked before they start, jobs that fail, what is missing run again, several devices a job."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from running import arguments, rows, start, train, wait_for_step
from sdtune.cli.launch import launch
from sdtune.errors import PRUNED, Pruned, RunFailed, Stopped
from sdtune.files import locked
from sdtune.methods.base import Adapter
from sdtune.sweeps.job_process import run_apart


@pytest.fixture
def settings(tiny: Path, images: Path, tmp_path: Path) -> list[str]:
    own = arguments(tiny, images, tmp_path, "name=mine", "trainer.max_steps=3", f"hydra.sweep.dir={tmp_path}/sweep")
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
    assert "; job 2 (method.rank=-1): method.rank: -1: input should be greater" in said
    assert said.endswith("; nothing was started\n")
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
    def alive() -> set[int]:
        return {id(found) for found in gc.get_objects() if issubclass(type(found), Adapter)}

    gc.collect()
    before = alive()  # of other tests
    gc.disable()
    try:
        assert train(*settings, "method.rank=1,2") == 0
        assert alive() <= before
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

    assert train(*own, f"resume={sweep}", "hardware.threads=1") == 0, "a machine may have other cores free by now"
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


def test_no_workers_are_refused(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*settings, "hydra/launcher=joblib", "hydra.launcher.n_jobs=0", "seed=0,1") == 2
    assert "hydra.launcher.n_jobs: 0; give a number of processes" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_no_sweep_to_resume(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("-m", f"resume={tmp_path}") == 2
    assert f"resume: {tmp_path} holds no sweep (no multirun.yaml)" in capsys.readouterr().err


HINTS = {
    "without -m": (["method.rank=2,3"], "method.rank: 2,3 are several values; add -m for a run of each"),
    "with --cfg": (["-m", "--cfg", "job", "method.rank=2,3"], "--cfg: shows the config of one job; leave out -m"),
    "no SLURM": (
        ["-m", "method.rank=2,3", "hydra/launcher=submitit_slurm"],
        "there is no srun here; submitit_local tries",
    ),
    "a metric": (["-m", "method.rank=2,3", "optimized_metric=stepz"], "there is no such metric; did you mean steps?"),
}


@pytest.mark.parametrize("case", HINTS)
def test_what_is_easily_got_wrong_is_answered_in_one_line(
    case: str, settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    words, message = HINTS[case]
    own = [word for word in settings if word != "-m"]
    capsys.readouterr()
    assert train(*words, *own) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_sweep_is_resumed_with_m(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "multirun.yaml").write_text("")
    assert train(f"resume={tmp_path}") == 2
    assert f"is a sweep's; add -m: sdtune train -m resume={tmp_path}" in capsys.readouterr().err


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
    assert json.loads((sweep / "0" / "job.json").read_text())["state"] == "unfinished"
    assert not (sweep / "1").exists()


@pytest.mark.slow
def test_each_job_of_two_devices_trains_its_own_rate_on_both(settings: list[str], tmp_path: Path) -> None:
    """Lightning's further processes repeat a command line; a sweep's would be a sweep again (and was).

    The third job has one device: nothing of the two before it is left.
    """
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = [a for a in settings if a != "hardware=cpu"]
    own += ["hardware=ddp", "hardware.accelerator=cpu", "data.batch_size=4", "method.rank=2"]
    process = start(log, *own, "optimizer.lr=1e-3,1e-4", "hardware.devices=2,1")
    assert process.wait(timeout=280) == 0, log.read_text()
    for job, rate, devices in (("0", 1e-3, 2), ("1", 1e-3, 1), ("2", 1e-4, 2), ("3", 1e-4, 1)):
        assert [float(r["lr/unet"]) for r in rows(sweep / job)] == [pytest.approx(rate)] * 3
        assert json.loads((sweep / job / "metrics.json").read_text())["steps"] == 3
        ranks = sorted((sweep / job).glob("train*.log"))
        assert len(ranks) == devices, "each rank has a log"
        # One process alone has nobody to compare its config with.
        assert devices == 1 or all(f"optimizer.lr {rate}" in file.read_text() for file in ranks)
    assert states(sweep) == dict.fromkeys("0123", "done")


@pytest.mark.slow
def test_a_job_of_two_devices_that_fails_leaves_the_others(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = [*settings, "hardware.strategy=ddp", "hardware.devices=2", "data.batch_size=4", "optimizer.lr=1e30,1e-3"]
    process = start(log, *own, "method.rank=2")
    assert process.wait(timeout=280) == 1, log.read_text()
    assert states(sweep) == {"0": "failed", "1": "done"}
    error = json.loads((sweep / "0" / "job.json").read_text())["error"]
    assert error.startswith("step 2: the loss or its gradient is not finite")


@pytest.mark.slow
def test_a_sweep_that_runs_keeps_others_out(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "sweep"):
        assert train(*settings, "method.rank=2,3") == 2
    assert f"{tmp_path}/sweep is in use by another process" in capsys.readouterr().err
    assert train(*settings, "method.rank=2,3") == 0
    with locked(tmp_path / "sweep" / "0"):
        (tmp_path / "sweep" / "0" / "metrics.json").unlink()
        assert train("-m", f"resume={tmp_path / 'sweep'}") == 1
    assert states(tmp_path / "sweep") == {"0": "failed", "1": "done"}


@pytest.mark.slow
def test_what_killed_processes_leave_says_nothing_wrong(settings: list[str], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    assert train(*settings, "method.rank=2,3,4") == 0
    before, config = ages(sweep), (sweep / "0" / ".hydra" / "config.yaml").read_text()
    (sweep / "0" / "job.json").unlink()  # killed between the run's last file and the job's
    state = json.loads((sweep / "1" / "job.json").read_text())
    (sweep / "1" / "job.json").write_text(json.dumps({**state, "state": "failed", "error": "mended by hand since"}))
    assert train("-m", f"resume={sweep}") == 0
    assert states(sweep) == {"0": "done", "1": "done", "2": "done"}
    assert ages(sweep) == before
    assert (sweep / "0" / ".hydra" / "config.yaml").read_text() == config


def test_a_sweep_remembers_its_config_folder(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    recipe = tmp_path / "conf" / "experiment" / "mine.yaml"
    recipe.write_text("# @package _global_\nmethod: {alpha_policy: constant, alpha: 4}\n")
    assert train("-cd", str(tmp_path / "conf"), *settings, "experiment=mine", "method.rank=2,3") == 0
    (tmp_path / "sweep" / "1" / "metrics.json").unlink()
    assert train("-m", f"resume={tmp_path / 'sweep'}") == 0
    recipe.write_text("# @package _global_\nmethod: {alpha_policy: rslora, alpha: 4}\n")
    assert train("-m", f"resume={tmp_path / 'sweep'}") == 2
    assert "method.alpha_policy is 'rslora' now and was 'constant'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["hydra.sweep.subdir=x${hydra.job.num}"], "hydra.sweep.subdir: the jobs' folders are called by their numbers"),
        (["logger=wandb"], "job 0 (method.rank=2) and 1 more: logger.wandb: no account"),
    ],
)
def test_what_would_fail_in_every_job_is_refused_at_once(
    own: list[str],
    words: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train(*settings, *own, "method.rank=2,3") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_under_torchrun_a_sweep_is_refused(
    settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert train(*settings, "method.rank=2,3") == 2
    assert "--multirun: torchrun would run the whole sweep in every process" in capsys.readouterr().err


def child(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have :func:`run_apart` start ``script`` in place of Python; its arguments go to ``folder``'s file ``asked``."""
    file = folder / "python"
    file.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\n{script}\n')
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def test_a_job_apart_that_is_pruned_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(tmp_path, "echo sdtune: pruned at step 7 >&2; exit 4", monkeypatch)
    with pytest.raises(Pruned) as end:
        run_apart("train", ["-cd", "mine"], ["seed=1"], tmp_path, False)
    assert end.value.step == 7
    assert (tmp_path / "asked").read_text() == f"-m sdtune train -cd mine seed=1 hydra.run.dir={tmp_path}\n"


def test_a_resumed_job_apart_takes_the_sweeps_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(tmp_path, "exit 0", monkeypatch)
    run_apart("train", [], ["seed=1", "hardware.threads=1"], tmp_path, True)
    assert (tmp_path / "asked").read_text() == f"-m sdtune train resume={tmp_path} hardware.threads=1\n"


@pytest.mark.parametrize(("lines", "left_out"), [(499, False), (500, False), (600, True)])
def test_of_a_long_stderr_the_end_is_kept(
    lines: int, left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "echo 'Traceback (most recent call last):' >&2; echo 'sdtune: the end' >&2; exit 1"
    child(tmp_path, f"for i in $(seq {lines - 2}); do echo line $i >&2; done; {words}", monkeypatch)
    with pytest.raises(RunFailed, match="the end") as end:
        run_apart("train", [], [], tmp_path, False)
    assert str(end.value.details).splitlines()[-1] == "sdtune: the end"
    assert str(end.value.details).startswith("(earlier lines are left out)") is left_out


def test_a_refusal_of_a_job_apart_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(tmp_path, "echo 'sdtune: seed: 1 is odd' >&2; exit 2", monkeypatch)
    with pytest.raises(RunFailed, match="seed: 1 is odd") as end:
        run_apart("train", [], [], tmp_path, False)
    assert end.value.details is None


def test_a_job_apart_whose_first_process_dies_takes_the_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(tmp_path, f"sleep 100 & echo $! > {tmp_path}/other; exit 9", monkeypatch)
    began = time.monotonic()
    with pytest.raises(RunFailed, match="its process ended with exit code 9"):
        run_apart("train", [], [], tmp_path, False)
    assert time.monotonic() - began < 9
    other = Path("/proc") / (tmp_path / "other").read_text().strip() / "stat"
    with contextlib.suppress(FileNotFoundError):
        while other.read_text().split()[2] != "Z":  # a killed process takes a moment to go
            assert time.monotonic() - began < 12
            time.sleep(0.05)


@pytest.mark.parametrize("script", ["trap 'exit 1' TERM; while :; do sleep 0.05; done", "sleep 20"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_job_apart_that_is_stopped_too_early_to_save_stops_the_sweep(
    script: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(tmp_path, script, monkeypatch)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    timer.start()
    with pytest.raises(Stopped) as stop:
        run_apart("train", [], [], tmp_path, False)
    assert stop.value.code == 128 + signal.SIGTERM


def test_the_exit_code_of_a_pruned_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(composed: Any) -> None:
        raise Pruned(3)

    with pytest.raises(SystemExit) as end:
        launch("train", [f"hydra.run.dir={tmp_path}/run"], lambda config, folder: run)
    assert end.value.code == PRUNED
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process speaks for all, and is killed with another's code
    launch("train", [f"hydra.run.dir={tmp_path}/run"], lambda config, folder: run)


@pytest.mark.parametrize(("agreed", "code"), [(True, 0), (False, 1)])
def test_a_further_process_leaves_its_code_to_the_first_where_all_know(
    agreed: bool, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(composed: Any) -> None:
        raise RunFailed("step 2 is not finite", agreed)

    monkeypatch.setenv("LOCAL_RANK", "1")
    found = 0
    try:
        launch("train", [f"hydra.run.dir={tmp_path}/run"], lambda config, folder: run)
    except SystemExit as end:
        found = int(str(end.code))
    assert found == code
