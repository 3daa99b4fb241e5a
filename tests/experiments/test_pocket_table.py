"""Table of a recipe's metrics over seeds: intervals and generated pages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.pocket import table
from sdtune.errors import UserError
from sdtune.pocket.evaluation.intervals import intervals


def test_interval_of_a_fraction_matches_its_standard_error() -> None:
    """For independent values, the interval is about the mean +- 1.96 standard errors."""
    rng = np.random.default_rng(0)
    values = (rng.random((3, 400)) < 0.3).astype(float)
    mean, low, high = intervals({"x": values}, None)["x"]
    error = 1.96 * (0.3 * 0.7 / values.size) ** 0.5
    assert mean == values.mean()
    assert low == pytest.approx(mean - error, abs=0.6 * error)
    assert high == pytest.approx(mean + error, abs=0.6 * error)


def test_different_seeds_widen_the_interval() -> None:
    equal, different = np.full((3, 100), 0.5), np.repeat([[0.0], [0.5], [1.0]], 100, axis=1)
    assert intervals({"x": equal}, None)["x"] == (0.5, 0.5, 0.5)
    _, low, high = intervals({"x": different}, None)["x"]
    assert low < 0.1
    assert high > 0.9


def test_gain_is_computed_within_each_resample() -> None:
    readings = {"subject_accuracy": np.full((2, 10), 0.8), "base_subject_accuracy": np.full((2, 10), 0.1)}
    assert intervals(readings, 0.9)["subject_gain"] == pytest.approx((0.875, 0.875, 0.875))


READINGS = {"control_agreement": [0.5, 1.0], "control_agreement_shuffled": [0.0, 0.5]}


def test_finished_runs_are_written_to_the_pages_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/README.md").write_text(
        "before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n", encoding="utf-8"
    )
    for seed in (0, 1):
        run = tmp_path / "outputs/results/some" / f"seed-{seed}"
        (run / "evaluation").mkdir(parents=True)
        (run / "samples").mkdir()
        (run / "samples" / "before_after.png").write_bytes(b"png")
        (run / "metrics.json").write_text(
            json.dumps({"steps": 3, "clip_text": 0.5 + seed, "artifact_bytes": 1234567, "zero": 0.0}), encoding="utf-8"
        )
        (run / "evaluation" / table.READINGS).write_text(
            json.dumps(READINGS | {"object_accuracy": [1.0, seed == 0]}), encoding="utf-8"
        )
        (run / ".hydra").mkdir()
        (run / ".hydra" / "config.yaml").write_text(f"seed: {seed}\n", encoding="utf-8")

    def fake_run(command: list[str], **_: Any) -> Any:
        assert command[-2:] == ["--cfg", "job"], "a finished run was repeated"
        return SimpleNamespace(stdout="\n".join(word.replace("=", ": ") for word in command if word[:4] == "seed"))

    monkeypatch.setattr(table.subprocess, "run", fake_run)
    monkeypatch.setattr(sys, "argv", ["table", "some", "--seeds", "0", "1"])
    table.main()
    page = (tmp_path / "experiments/some/README.md").read_text(encoding="utf-8")
    assert "| object_accuracy | 0.750 |" in page
    assert "| clip_text | 0.500 | 1.500 |" in page
    assert "| artifact_bytes | 1,234,567 | 1,234,567 |" in page
    assert "| zero | 0.000 | 0.000 |" in page
    results = json.loads((tmp_path / "experiments/some/metrics.json").read_text(encoding="utf-8"))
    assert results["seeds"]["1"]["clip_text"] == 1.5
    assert results["figures"]["control_less_shuffled"] == [0.5, 0.5, 0.5]
    overview_page = (tmp_path / "experiments/README.md").read_text(encoding="utf-8")
    assert overview_page.startswith("before\n")
    assert overview_page.endswith("after\n")
    assert "old" not in overview_page
    assert "| [some](some/README.md) | 2 | 0.750 (0.500 to 1.000) | 0.500 (0.500 to 0.500) | 0.750 (" in overview_page
    (tmp_path / "outputs/results/some/seed-1/.hydra/config.yaml").write_text("seed: 2\n", encoding="utf-8")
    with pytest.raises(UserError, match="seed-1 was run with another version of some .seed was 2, is now 1."):
        table.main()
