"""Concurrent jobs of a sweep: with joblib, and with submitit's local executor, which works as on a SLURM cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from running import arguments, rows, start, wait_for_step

LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "hydra.launcher.cpus_per_task=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_runs_all_jobs_and_reports_a_failed_one(
    launcher: str, tiny: Path, images: Path, tmp_path: Path
) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    overrides = arguments(tiny, images, tmp_path, "name=mine", "trainer.max_steps=3", f"hydra.sweep.dir={sweep}")
    overrides = [a for a in overrides if not a.startswith(("hydra.run.dir", "method.rank"))]
    process = start(log, "-m", *overrides, *LAUNCHERS[launcher], "method.rank=2", "optimizer.lr=1e-3,1e30,1e-4")
    assert process.wait(timeout=280) == 1, log.read_text(encoding="utf-8")
    states = {
        job["job"]: job["state"] for job in json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))["jobs"]
    }
    assert states == {"0": "done", "1": "failed", "2": "done"}, log.read_text(encoding="utf-8")
    for job, rate in (("0", 1e-3), ("2", 1e-4)):
        assert [float(r["lr/denoiser"]) for r in rows(sweep / job)] == [pytest.approx(rate)] * 3
    assert "job 1 (optimizer.lr=1e+30) failed: step 2: the loss or its gradient is not finite" in log.read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_stopped_joblib_sweep_without_workers_saves_its_job(tiny: Path, images: Path, tmp_path: Path) -> None:
    """With n_jobs=1, joblib starts no worker; the job runs in the process of the sweep."""
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    overrides = arguments(tiny, images, tmp_path, "name=mine", "trainer.max_steps=1000", f"hydra.sweep.dir={sweep}")
    overrides = [a for a in overrides if not a.startswith(("hydra.run.dir", "method.rank"))]
    words = [
        "-m",
        *overrides,
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=1",
        "method.rank=2",
        "optimizer.lr=1e-3,1e-4",
    ]
    process = start(log, *words)
    wait_for_step(process, sweep / "0", 3, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=100) == 130, log.read_text(encoding="utf-8")
    assert log.read_text(encoding="utf-8").rstrip().endswith(f"continue it with: sdtune train -m resume={sweep}")
    [checkpoint] = (sweep / "0" / "checkpoints").glob("*")
    assert checkpoint.name == f"step{len(rows(sweep / '0')):08d}.ckpt"
    assert not (sweep / "1").exists(), "no new job starts"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_stopped_joblib_sweep_saves_every_running_job(how: str, tiny: Path, images: Path, tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches all processes; SIGTERM of a scheduler may reach only the main process."""
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    overrides = arguments(tiny, images, tmp_path, "name=mine", "trainer.max_steps=1000", f"hydra.sweep.dir={sweep}")
    overrides = [a for a in overrides if not a.startswith(("hydra.run.dir", "method.rank"))]
    words = ["-m", *overrides, *LAUNCHERS["joblib"], "method.rank=2", "optimizer.lr=1e-3,1e-4,1e-5"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdtune", "train", *words], stdout=out, stderr=out, start_new_session=True
        )
    deadline = time.monotonic() + 200
    while not all((sweep / job / "metrics.csv").exists() and len(rows(sweep / job)) > 2 for job in "01"):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT) if how == "Ctrl-C" else process.terminate()
    assert process.wait(timeout=100) == (130 if how == "Ctrl-C" else 143), log.read_text(encoding="utf-8")
    output = log.read_text(encoding="utf-8")
    assert "sdtune: stopping; the running jobs save first" in output
    assert output.rstrip().endswith(f"sdtune: the sweep is stopped; continue it with: sdtune train -m resume={sweep}")
    for job in "01":
        [checkpoint] = (sweep / job / "checkpoints").glob("*")
        assert checkpoint.name == f"step{len(rows(sweep / job)):08d}.ckpt"
        assert json.loads((sweep / job / "job.json").read_text(encoding="utf-8"))["state"] == "unfinished"
    assert not (sweep / "2" / "metrics.csv").exists(), "no new job starts"
    assert {file.name for file in sweep.glob(".*")} == {".lock"}, "the files of the stop are removed"
