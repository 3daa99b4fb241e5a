"""A plain multirun: folders, and a job that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from running import arguments, rows, train


def test_a_failing_job_is_named_and_the_others_run_on(
    tiny: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [a for a in arguments(tiny, pictures, tmp_path) if not a.startswith(("hydra.run.dir", "method.rank"))]
    code = train("-m", *settings, "trainer.max_steps=2", f"hydra.sweep.dir={tmp_path}/sweep", "method.rank=0,2,3")
    said = capsys.readouterr().err
    assert code == 1
    assert "method.rank=0" in said
    assert "method.rank: 0: input should be greater than or equal to 1" in said
    for job in ("1", "2"):
        assert len(rows(tmp_path / "sweep" / job)) == 2
        assert (tmp_path / "sweep" / job / "metrics.json").exists()
    assert not (tmp_path / "sweep" / "0" / "metrics.csv").exists()
