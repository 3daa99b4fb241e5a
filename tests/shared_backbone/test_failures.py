"""Failures on a shared backbone: one job fails alone, or a step fails all its jobs and ends the sweep."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from running import train
from sdtune.errors import RunFailed
from sdtune.shared_backbone import pool
from sdtune.shared_backbone.batched_denoiser import Mode
from sdtune.shared_backbone.step_coordinator import JoinCall, PendingCall, StepCoordinator
from sdtune.sweeps import job as jobs

LAUNCHER = ("hydra/launcher=shared_backbone", "hydra.launcher.processes=1")


@pytest.mark.slow
def test_step_out_of_memory_fails_its_jobs_and_ends_the_sweep(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = pool.Pool.compute

    def out_of_memory(self: pool.Pool, calls: dict[int, pool.Forward], idle: set[int]) -> None:
        if next(iter(calls.values())).mode.gradients:
            raise torch.OutOfMemoryError
        forward(self, calls, idle)

    monkeypatch.setattr(pool.Pool, "compute", out_of_memory)
    overrides = [
        *settings,
        "callbacks.samples=null",
        *LAUNCHER,
        "hydra.launcher.max_concurrent_runs=2",
        "optimizer.lr=1e-3,1e-4,1e-5",
    ]
    assert train(*overrides, f"hydra.sweep.dir={tmp_path}/sweep") == 1
    message = "out of memory on the device with 2 concurrent runs: set hydra.launcher.max_concurrent_runs=1"
    states = [json.loads((tmp_path / "sweep" / job / "job.json").read_text(encoding="utf-8")) for job in "01"]
    assert [(state["state"], state["error"]) for state in states] == [("failed", message)] * 2
    assert not (tmp_path / "sweep" / "2").exists()
    captured = capsys.readouterr()
    assert "sweep: 0 of 2 jobs are done" in captured.out
    assert f"sdtune: {message}\n" in captured.err
    monkeypatch.setattr(pool.Pool, "compute", forward)
    assert train("-m", f"resume={tmp_path}/sweep", "hydra.launcher.max_concurrent_runs=1") == 0
    captured = capsys.readouterr()
    assert "jobs 0-2 share one backbone, 1 at a time" in captured.out
    assert "sweep: 3 of 3 jobs are done" in captured.out


@pytest.mark.slow
def test_validation_out_of_memory_fails_only_its_job(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = pool.Pool.compute
    failed: list[int] = []

    def out_of_memory(self: pool.Pool, calls: dict[int, pool.Forward], idle: set[int]) -> None:
        if not next(iter(calls.values())).mode.gradients and 0 in calls and not failed:
            failed.extend(calls)
            raise torch.OutOfMemoryError
        forward(self, calls, idle)

    monkeypatch.setattr(pool.Pool, "compute", out_of_memory)
    overrides = [*settings, "callbacks.samples=null", "data.hold_out=5", "seed=0,1", "trainer.val_check_interval=1,2"]
    overrides += [*LAUNCHER, "hydra.launcher.max_concurrent_runs=2"]
    assert train(*overrides, f"hydra.sweep.dir={tmp_path}/sweep") == 1
    assert failed == [0]  # job 0 validates while the other job is in a step
    states = [json.loads((tmp_path / "sweep" / job / "job.json").read_text(encoding="utf-8")) for job in "0123"]
    assert [state["state"] for state in states] == ["failed", "done", "done", "done"]
    assert states[0]["error"].startswith(
        "out of memory on the device with 2 concurrent runs: set hydra.launcher.max_concurrent_runs="
    )
    assert "3 of 4 jobs are done" in capsys.readouterr().out


def test_job_that_waits_for_images_survives_a_failed_step() -> None:
    answered: list[int] = []

    class PoolOutOfMemory(pool.Pool):
        def compute(self, calls: dict[int, pool.Forward], idle: set[int]) -> None:
            if next(iter(calls.values())).mode.gradients:
                raise torch.OutOfMemoryError
            for number, call in calls.items():
                answered.append(number)
                call.answer = torch.ones(1)

        def in_parts(self, calls: dict[int, pool.Forward]) -> Iterator[dict[int, pool.Forward]]:
            yield calls

    def forward(gradients: bool) -> pool.Forward:
        mode = Mode(gradients, gradients, (False, torch.float32), torch.float32)
        return pool.Forward(None, {"sample": torch.zeros(1)}, mode)  # type: ignore[arg-type]

    coordinator = StepCoordinator(2, PoolOutOfMemory(torch.device("cpu"), "32-true", 2, 4, False).answer)
    ended: list[str] = []

    def job(name: str, call: PendingCall) -> Callable[[], None]:
        def run() -> None:
            coordinator.request(JoinCall())
            try:
                coordinator.request(call)
            except RunFailed:
                ended.append(f"{name} failed")
            else:
                ended.append(f"{name} answered")

        return run

    coordinator.run(iter([job("step", forward(True)), job("images", forward(False))]))
    # The call for images waits until the job of the step has ended and the memory of its activations is free.
    assert ended == ["step failed", "images answered"]
    assert answered == [1]
    assert "max_concurrent_runs=1" in str(coordinator.error)


@pytest.mark.slow
def test_unwritable_folder_fails_only_its_job(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = jobs.write_json

    def disk_full(path: Path, content: object) -> None:
        if path == tmp_path / "sweep" / "0" / jobs.STATE:
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(jobs, "write_json", disk_full)
    overrides = [*settings, "callbacks.samples=null", *LAUNCHER, "optimizer.lr=1e-3,1e-4"]
    assert train(*overrides, f"hydra.sweep.dir={tmp_path}/sweep") == 1
    assert "sdtune: job 0: [Errno 28] No space left on device" in capsys.readouterr().err
    assert json.loads((tmp_path / "sweep" / "1" / "job.json").read_text(encoding="utf-8"))["state"] == "done"
