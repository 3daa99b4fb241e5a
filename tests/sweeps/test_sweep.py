"""Sweeps: checks before the start, failed jobs, resuming, jobs on several devices."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
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
from sdtune.sweeps.job_process import run_subprocess


@pytest.fixture
def settings(tiny: Path, images: Path, tmp_path: Path) -> list[str]:
    overrides = arguments(
        tiny, images, tmp_path, "name=mine", "trainer.max_steps=3", f"hydra.sweep.dir={tmp_path}/sweep"
    )
    return ["-m", *(a for a in overrides if not a.startswith(("hydra.run.dir", "method.rank")))]


def states(sweep: Path) -> dict[str, str]:
    return {job["job"]: job["state"] for job in json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))["jobs"]}


def ages(sweep: Path) -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in sweep.glob("*/metrics.json")}


def test_all_jobs_are_checked_before_the_first_starts(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*settings, "method.rank=2,0,-1") == 2
    error = capsys.readouterr().err
    assert error.startswith("sdtune: job 1 (")
    assert "job 1 (method.rank=0): method.rank: got 0; expected int >= 1 or null" in error
    assert "; job 2 (method.rank=-1): method.rank: got -1; expected int >= 1" in error
    assert error.endswith("; no job was started\n")
    assert error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(("more", "is_warned"), [((), True), (("data.hold_out=5",), False)])
def test_sweep_without_a_metric_to_rank_by_is_warned_about(
    more: tuple[str, ...], is_warned: bool, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*settings, *more, "method.rank=2,4") == 0
    assert ("WARNING: the jobs record no metric that ranks them; " in capsys.readouterr().out) == (is_warned)


def test_sweep_names_its_jobs_the_time_left_and_their_ranking(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*settings, "data.hold_out=5", "trainer.val_check_interval=1", "method.rank=2,4", "seed=0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("checking 2 jobs before the first starts; all with: ")
    assert sum("data.hold_out=5" in line for line in lines) == 1
    assert "job 1 of 2: method.rank=2" in lines
    assert sum(line.startswith("sample with it: ") for line in lines) == 0
    [second] = [line for line in lines if line.startswith("job 2 of 2")]
    assert re.fullmatch(r"job 2 of 2, about \d+ s left: method.rank=4", second)
    first = lines.index("ranking by validation_loss:")
    losses = {
        job: json.loads((tmp_path / "sweep" / job / "metrics.json").read_text(encoding="utf-8"))["validation_loss"]
        for job in ("0", "1")
    }
    best = min(losses, key=lambda job: losses[job])
    assert lines[first + 1].split()[0] == "1"
    assert lines[first + 1].endswith(f"method.rank {'24'[int(best)]}")
    assert lines[first + 3].startswith("best of 2 settings by validation_loss: ")


def test_failed_job_is_reported_and_the_others_run(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    # With the learning rate 1e30, the loss of the second step is not finite.
    assert train(*settings, "method.rank=2", "optimizer.lr=1e-3,1e30,1e-4") == 1
    captured = capsys.readouterr()
    assert f"sweep: 2 of 3 jobs are done: {sweep}" in captured.out
    failures = [line for line in captured.err.splitlines() if line.startswith("sdtune: job 1 (")]
    assert len(failures) == 1
    assert "(optimizer.lr=1e+30) failed: step 2: the loss or its gradient is not finite" in failures[0]
    assert captured.err.splitlines()[-1] == f"sdtune: run the failed jobs again with: sdtune train -m resume={sweep}"
    assert states(sweep) == {"0": "done", "1": "failed", "2": "done"}
    assert [len(rows(sweep / job)) for job in ("0", "2")] == [3, 3]
    rates = [float(rows(sweep / job)[-1]["lr/denoiser"]) for job in ("0", "2")]
    assert rates == [pytest.approx(1e-3), pytest.approx(1e-4)]


@pytest.mark.slow
def test_models_of_ended_jobs_are_freed(settings: list[str]) -> None:
    def adapters() -> set[int]:
        return {id(item) for item in gc.get_objects() if issubclass(type(item), Adapter)}

    gc.collect()
    before = adapters()  # left over from other tests
    gc.disable()
    try:
        assert train(*settings, "method.rank=1,2") == 0
        assert adapters() <= before
    finally:
        gc.enable()


def test_resumed_sweep_runs_only_unfinished_jobs(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    overrides = [*settings, "method.rank=2,3,4", "checkpoint.every_steps=2"]
    assert train(*overrides) == 0
    complete = {job: rows(sweep / job) for job in ("0", "1", "2")}
    before = ages(sweep)
    # Job 1 was killed after its second step, job 2 before its first.
    (sweep / "1" / "metrics.json").unlink()
    (sweep / "1" / "checkpoints" / "step00000003.ckpt").unlink()
    (sweep / "2" / "metrics.json").unlink()
    for file in (sweep / "2" / "checkpoints").iterdir():
        file.unlink()

    assert train(*overrides) == 2
    assert (
        f"hydra.sweep.dir: {sweep} already contains a sweep; add resume={sweep} to continue it"
        in capsys.readouterr().err
    )
    assert train(*overrides, "optimizer.lr=1", f"resume={sweep}") == 2
    assert "resume: optimizer.lr=1 is not an override of the sweep" in capsys.readouterr().err
    assert ages(sweep) == {"0": before["0"]}

    assert train(*overrides, f"resume={sweep}", "hardware.threads=1") == 0, "the number of threads may change"
    output = capsys.readouterr().out
    assert output.count("resuming at step 2 from") == 1
    assert {job: rows(sweep / job) for job in complete} == complete
    after = ages(sweep)
    assert after["0"] == before["0"]
    assert after.keys() == before.keys()
    assert states(sweep) == {"0": "done", "1": "done", "2": "done"}
    assert train("-m", f"resume={sweep}") == 0  # the overrides need not be repeated
    assert train(*overrides, "resume=auto") == 0
    assert ages(sweep) == after


@pytest.mark.slow
def test_resuming_with_an_edited_recipe_is_refused(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    recipe = tmp_path / "conf" / "experiment" / "mine.yaml"
    recipe.write_text("# @package _global_\noptimizer:\n  lr: 1e-3\n", encoding="utf-8")
    overrides = ["-cd", str(tmp_path / "conf"), *settings, "experiment=mine", "method.rank=2,3"]
    assert train(*overrides) == 0
    recipe.write_text("# @package _global_\noptimizer:\n  lr: 1e-4\n", encoding="utf-8")
    capsys.readouterr()
    assert train(*overrides, f"resume={tmp_path}/sweep") == 2
    assert "resume: optimizer.lr is 0.0001 now and was 0.001 when the run started" in capsys.readouterr().err


def test_zero_joblib_processes_are_refused(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*settings, "hydra/launcher=joblib", "hydra.launcher.n_jobs=0", "seed=0,1") == 2
    assert "hydra.launcher.n_jobs: got 0; set the number of processes" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_resuming_a_folder_without_a_sweep_is_refused(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("-m", f"resume={tmp_path}") == 2
    assert f"resume: {tmp_path} is not a sweep folder (multirun.yaml is missing)" in capsys.readouterr().err


HINTS = {
    "without -m": (["method.rank=2,3"], "method.rank: several values (2,3); add -m for a sweep"),
    "with --cfg": (["-m", "--cfg", "job", "method.rank=2,3"], "--cfg: shows the config of one job; remove -m"),
    "no SLURM": (
        ["-m", "method.rank=2,3", "hydra/launcher=submitit_slurm"],
        "srun is not found; set hydra/launcher=submitit_local",
    ),
    "a metric": (["-m", "method.rank=2,3", "optimized_metric=stepz"], "unknown metric stepz; did you mean steps?"),
}


@pytest.mark.parametrize("case", HINTS)
def test_common_mistake_is_refused_in_one_line(
    case: str, settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    words, message = HINTS[case]
    overrides = [word for word in settings if word != "-m"]
    capsys.readouterr()
    assert train(*words, *overrides) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_resuming_a_sweep_without_multirun_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "multirun.yaml").write_text("", encoding="utf-8")
    assert train(f"resume={tmp_path}") == 2
    assert f"is a sweep folder; add -m: sdtune train -m resume={tmp_path}" in capsys.readouterr().err


def test_stopped_sweep_prints_the_command_that_continues_it(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [a for a in settings if not a.startswith("trainer.max_steps")]
    overrides += ["trainer.max_steps=100000,4", "checkpoint.every_steps=100000"]
    process = start(log, *overrides)
    wait_for_step(process, sweep / "0", 3, log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=200) == 130, log.read_text(encoding="utf-8")
    assert (
        log.read_text(encoding="utf-8").splitlines()[-1]
        == f"sdtune: the sweep is stopped; continue it with: sdtune train -m resume={sweep}"
    )
    assert len(list((sweep / "0" / "checkpoints").glob("step*.ckpt"))) == 1
    assert json.loads((sweep / "0" / "job.json").read_text(encoding="utf-8"))["state"] == "unfinished"
    assert not (sweep / "1").exists()


@pytest.mark.slow
def test_each_job_on_two_devices_uses_its_own_learning_rate(settings: list[str], tmp_path: Path) -> None:
    """Lightning starts the other ranks with the command line of the process, which must not be that of the sweep.

    Jobs on one device run after jobs on two: nothing of the process group may remain.
    """
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [a for a in settings if a != "hardware=cpu"]
    overrides += ["hardware=ddp", "hardware.accelerator=cpu", "data.batch_size=4", "method.rank=2"]
    process = start(log, *overrides, "optimizer.lr=1e-3,1e-4", "hardware.devices=2,1")
    assert process.wait(timeout=280) == 0, log.read_text(encoding="utf-8")
    for job, rate, devices in (("0", 1e-3, 2), ("1", 1e-3, 1), ("2", 1e-4, 2), ("3", 1e-4, 1)):
        assert [float(r["lr/denoiser"]) for r in rows(sweep / job)] == [pytest.approx(rate)] * 3
        assert json.loads((sweep / job / "metrics.json").read_text(encoding="utf-8"))["steps"] == 3
        logs = sorted((sweep / job).glob("train*.log"))
        assert len(logs) == devices, "each rank has a log"
        # The ranks compare their configs only if there are several.
        assert devices == 1 or all(f"optimizer.lr {rate}" in file.read_text(encoding="utf-8") for file in logs)
    assert states(sweep) == dict.fromkeys("0123", "done")


@pytest.mark.slow
def test_failed_job_on_two_devices_does_not_end_the_sweep(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [
        *settings,
        "hardware.strategy=ddp",
        "hardware.devices=2",
        "data.batch_size=4",
        "optimizer.lr=1e30,1e-3",
    ]
    process = start(log, *overrides, "method.rank=2")
    assert process.wait(timeout=280) == 1, log.read_text(encoding="utf-8")
    assert states(sweep) == {"0": "failed", "1": "done"}
    error = json.loads((sweep / "0" / "job.json").read_text(encoding="utf-8"))["error"]
    assert error.startswith("step 2: the loss or its gradient is not finite")


@pytest.mark.slow
def test_folder_of_a_running_sweep_is_locked(
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
def test_finished_job_with_a_stale_state_file_is_done(settings: list[str], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    assert train(*settings, "method.rank=2,3,4") == 0
    before, config = ages(sweep), (sweep / "0" / ".hydra" / "config.yaml").read_text(encoding="utf-8")
    (sweep / "0" / "job.json").unlink()  # as if killed between the last file of the run and that of the job
    state = json.loads((sweep / "1" / "job.json").read_text(encoding="utf-8"))
    (sweep / "1" / "job.json").write_text(
        json.dumps({**state, "state": "failed", "error": "fixed manually since"}), encoding="utf-8"
    )
    assert train("-m", f"resume={sweep}") == 0
    assert states(sweep) == {"0": "done", "1": "done", "2": "done"}
    assert ages(sweep) == before
    assert (sweep / "0" / ".hydra" / "config.yaml").read_text(encoding="utf-8") == config


@pytest.mark.slow
def test_resumed_sweep_uses_its_config_folder(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    recipe = tmp_path / "conf" / "experiment" / "mine.yaml"
    recipe.write_text("# @package _global_\nmethod: {alpha_policy: constant, alpha: 4}\n", encoding="utf-8")
    assert train("-cd", str(tmp_path / "conf"), *settings, "experiment=mine", "method.rank=2,3") == 0
    (tmp_path / "sweep" / "1" / "metrics.json").unlink()
    assert train("-m", f"resume={tmp_path / 'sweep'}") == 0
    recipe.write_text("# @package _global_\nmethod: {alpha_policy: rslora, alpha: 4}\n", encoding="utf-8")
    assert train("-m", f"resume={tmp_path / 'sweep'}") == 2
    assert "method.alpha_policy is 'rslora' now and was 'constant'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra.sweep.subdir=x${hydra.job.num}"], "hydra.sweep.subdir: setting of Hydra that sdtune does not support"),
        (["logger=wandb"], "job 0 (method.rank=2) and 1 more: logger.wandb: no account"),
    ],
)
def test_setting_that_fails_in_every_job_is_refused_before_the_start(
    overrides: list[str],
    message: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train(*settings, *overrides, "method.rank=2,3") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_sweep_under_torchrun_is_refused(
    settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert train(*settings, "method.rank=2,3") == 2
    assert "--multirun: torchrun would run the full sweep in every process" in capsys.readouterr().err


def replace_python(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have :func:`run_subprocess` run ``script`` instead of Python, with its arguments in ``folder/arguments``."""
    file = folder / "python"
    file.write_text(f'#!/bin/sh\necho "$@" > {folder}/arguments\n{script}\n', encoding="utf-8")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def test_pruned_subprocess_raises_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_python(tmp_path, "echo sdtune: pruned at step 7 >&2; exit 4", monkeypatch)
    with pytest.raises(Pruned) as end:
        run_subprocess("train", ["-cd", "mine"], ["seed=1"], tmp_path, False)
    assert end.value.step == 7
    assert (tmp_path / "arguments").read_text(
        encoding="utf-8"
    ) == f"-m sdtune train -cd mine seed=1 hydra.run.dir={tmp_path}\n"


def test_resumed_subprocess_receives_the_threads_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_python(tmp_path, "exit 0", monkeypatch)
    run_subprocess("train", [], ["seed=1", "hardware.threads=1"], tmp_path, True)
    assert (tmp_path / "arguments").read_text(
        encoding="utf-8"
    ) == f"-m sdtune train resume={tmp_path} hardware.threads=1\n"


@pytest.mark.parametrize(("lines", "omitted"), [(499, False), (500, False), (600, True)])
def test_last_lines_of_a_long_stderr_are_stored(
    lines: int, omitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "echo 'Traceback (most recent call last):' >&2; echo 'sdtune: the end' >&2; exit 1"
    replace_python(tmp_path, f"for i in $(seq {lines - 2}); do echo line $i >&2; done; {words}", monkeypatch)
    with pytest.raises(RunFailed, match="the end") as end:
        run_subprocess("train", [], [], tmp_path, False)
    assert str(end.value.details).splitlines()[-1] == "sdtune: the end"
    assert str(end.value.details).startswith("(earlier lines are omitted)") is omitted


def test_refusal_of_a_subprocess_has_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_python(tmp_path, "echo 'sdtune: seed: 1 is odd' >&2; exit 2", monkeypatch)
    with pytest.raises(RunFailed, match="seed: 1 is odd") as end:
        run_subprocess("train", [], [], tmp_path, False)
    assert end.value.details is None


def test_other_ranks_are_killed_when_the_subprocess_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_python(tmp_path, f"sleep 100 & echo $! > {tmp_path}/other; exit 9", monkeypatch)
    start_time = time.monotonic()
    with pytest.raises(RunFailed, match="its process ended with exit code 9"):
        run_subprocess("train", [], [], tmp_path, False)
    assert time.monotonic() - start_time < 9
    other_process = Path("/proc") / (tmp_path / "other").read_text(encoding="utf-8").strip() / "stat"
    with contextlib.suppress(FileNotFoundError):
        while other_process.read_text(encoding="utf-8").split()[2] != "Z":  # a killed process does not end immediately
            assert time.monotonic() - start_time < 12
            time.sleep(0.05)


@pytest.mark.parametrize("script", ["trap 'exit 1' TERM HUP; while :; do sleep 0.05; done", "sleep 20"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_subprocess_stopped_before_it_can_save_stops_the_sweep(
    script: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_python(tmp_path, script, monkeypatch)
    inherited = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    timer.start()
    try:
        with pytest.raises(Stopped) as stop:
            run_subprocess("train", [], [], tmp_path, False)
    finally:
        signal.signal(number, inherited)
    assert stop.value.code == 128 + number


def test_pruned_run_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(composed: Any) -> None:
        raise Pruned(3)

    with pytest.raises(SystemExit) as end:
        launch("train", [f"hydra.run.dir={tmp_path}/run"], lambda config, folder: run)
    assert end.value.code == PRUNED
    # Only rank 0 exits with the code of the run: Lightning kills it if another rank exits with an error.
    monkeypatch.setenv("LOCAL_RANK", "1")
    launch("train", [f"hydra.run.dir={tmp_path}/run"], lambda config, folder: run)


@pytest.mark.parametrize(("agreed", "code"), [(True, 0), (False, 1)])
def test_other_rank_exits_with_zero_if_all_ranks_know_the_failure(
    agreed: bool, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(composed: Any) -> None:
        raise RunFailed("step 2 is not finite", agreed)

    monkeypatch.setenv("LOCAL_RANK", "1")
    exit_code = 0
    try:
        launch("train", [f"hydra.run.dir={tmp_path}/run"], lambda config, folder: run)
    except SystemExit as end:
        exit_code = int(str(end.code))
    assert exit_code == code
