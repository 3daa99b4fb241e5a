"""The sweep's jobs side by side: joblib, and submitit's local executor, which takes the way of a SLURM cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from running import arguments, rows, start

LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "hydra.launcher.cpus_per_task=1"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_run_side_by_side(launcher: str, tiny: Path, pictures: Path, tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = arguments(tiny, pictures, tmp_path, "name=mine", "trainer.max_steps=3", f"hydra.sweep.dir={sweep}")
    own = [a for a in own if not a.startswith(("hydra.run.dir", "method.rank"))]
    process = start(log, "-m", *own, *LAUNCHERS[launcher], "method.rank=2", "optimizer.lr=1e-3,1e30,1e-4")
    assert process.wait(timeout=280) == 1, log.read_text()
    found = {job["job"]: job["state"] for job in json.loads((sweep / "sweep.json").read_text())["jobs"]}
    assert found == {"0": "done", "1": "failed", "2": "done"}, log.read_text()
    for job, rate in (("0", 1e-3), ("2", 1e-4)):
        assert [float(r["lr/unet"]) for r in rows(sweep / job)] == [pytest.approx(rate)] * 3
    assert "job 1 (optimizer.lr=1e+30) failed: step 2: the loss or its gradient is not finite" in log.read_text()
