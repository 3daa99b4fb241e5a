"""The results of sdtune equal those of the commit that the golden records were made from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from golden import golden


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_results_of_all_cases_equal_the_golden_records(tmp_path: Path) -> None:
    if golden.machine() not in golden.records():
        pytest.skip(f"no golden record for {golden.machine()}; record the base commit first: see CONTRIBUTING.md")
    command = golden.Sdtune(Path(sys.executable).with_name("sdtune"), base=False)
    assert golden.differences(golden.records()[golden.machine()], golden.everything(command, tmp_path, [])) == []


def test_missing_new_and_changed_results_are_listed() -> None:
    before, now = {"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}
    assert golden.differences(before, now) == ["missing: c", "new: d", "differs: b"]


def test_hash_of_metrics_depends_on_losses_and_not_on_times(tmp_path: Path) -> None:
    def hashed(**metrics: float) -> str:
        file = tmp_path / "metrics.json"
        file.write_text(json.dumps(metrics), encoding="utf-8")
        return golden.of_metrics(file)

    assert hashed(loss=1.0, train_seconds=2.0) == hashed(loss=1.0, train_seconds=3.0)
    assert hashed(loss=1.0) != hashed(loss=1.5)
