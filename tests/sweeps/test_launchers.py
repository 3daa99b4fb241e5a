"""The sweep's jobs side by side: joblib, and submitit's local executor, which takes the way of a SLURM cluster."""

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
def test_jobs_run_side_by_side(launcher: str, tiny: Path, images: Path, tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = arguments(tiny, images, tmp_path, "name=mine", "trainer.max_steps=3", f"hydra.sweep.dir={sweep}")
    own = [a for a in own if not a.startswith(("hydra.run.dir", "method.rank"))]
    process = start(log, "-m", *own, *LAUNCHERS[launcher], "method.rank=2", "optimizer.lr=1e-3,1e30,1e-4")
    assert process.wait(timeout=280) == 1, log.read_text()
    found = {job["job"]: job["state"] for job in json.loads((sweep / "sweep.json").read_text())["jobs"]}
    assert found == {"0": "done", "1": "failed", "2": "done"}, log.read_text()
    for job, rate in (("0", 1e-3), ("2", 1e-4)):
        assert [float(r["lr/unet"]) for r in rows(sweep / job)] == [pytest.approx(rate)] * 3
    assert "job 1 (optimizer.lr=1e+30) failed: step 2: the loss or its gradient is not finite" in log.read_text()


def test_one_of_joblibs_jobs_at_once_is_stopped_with_its_sweep(tiny: Path, images: Path, tmp_path: Path) -> None:
    """joblib starts no worker for it: it runs in the sweep's own process."""
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = arguments(tiny, images, tmp_path, "name=mine", "trainer.max_steps=1000", f"hydra.sweep.dir={sweep}")
    own = [a for a in own if not a.startswith(("hydra.run.dir", "method.rank"))]
    words = ["-m", *own, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "method.rank=2", "optimizer.lr=1e-3,1e-4"]
    process = start(log, *words)
    wait_for_step(process, sweep / "0", 3, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=100) == 130, log.read_text()
    assert log.read_text().rstrip().endswith(f"sdtune train -m resume={sweep} goes on with it")
    [kept] = (sweep / "0" / "checkpoints").glob("*")
    assert kept.name == f"step{len(rows(sweep / '0')):08d}.ckpt"
    assert not (sweep / "1").exists(), "no further job begins"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_stopped_side_by_side_every_job_saves(how: str, tiny: Path, images: Path, tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches all processes; a scheduler's SIGTERM perhaps only the sweep's own."""
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = arguments(tiny, images, tmp_path, "name=mine", "trainer.max_steps=1000", f"hydra.sweep.dir={sweep}")
    own = [a for a in own if not a.startswith(("hydra.run.dir", "method.rank"))]
    words = ["-m", *own, *LAUNCHERS["joblib"], "method.rank=2", "optimizer.lr=1e-3,1e-4,1e-5"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdtune", "train", *words], stdout=out, stderr=out, start_new_session=True
        )
    until = time.monotonic() + 200
    while not all((sweep / job / "metrics.csv").exists() and len(rows(sweep / job)) > 2 for job in "01"):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT) if how == "Ctrl-C" else process.terminate()
    assert process.wait(timeout=100) == (130 if how == "Ctrl-C" else 143), log.read_text()
    said = log.read_text()
    assert "sdtune: stopping; the jobs at hand save first" in said
    assert said.rstrip().endswith(f"sdtune: the sweep is stopped; sdtune train -m resume={sweep} goes on with it")
    for job in "01":
        [kept] = (sweep / job / "checkpoints").glob("*")
        assert kept.name == f"step{len(rows(sweep / job)):08d}.ckpt"
        assert json.loads((sweep / job / "job.json").read_text())["state"] == "unfinished"
    assert not (sweep / "2" / "metrics.csv").exists(), "no further job begins"
    assert {file.name for file in sweep.glob(".*")} == {".lock"}, "nothing of the stop is left"
