"""An evaluation that fails for lack of memory or of a file does not fail the run; a bug does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from running import arguments, sdtune, train
from sdtune.errors import UserError
from sdtune.evaluation import ClipMetrics


def overrides(tiny: Path, images: Path, run: Path) -> list[str]:
    more = ["evaluation=clip", "exports=[{format: kohya}]", "trainer.max_steps=1", "name=mine"]
    return [text for text in arguments(tiny, images, run, *more) if text != "evaluation=none"]


def raises(error: Exception) -> Any:
    def run(*_: Any) -> Any:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        pytest.param(
            UserError("weights.bin is damaged", key="evaluation.clip", remedy="copy it again"),
            "weights.bin is damaged",
            marks=pytest.mark.slow,
        ),
        pytest.param(OSError(5, "Input/output error"), "Input/output error", marks=pytest.mark.slow),
    ],
    ids=["memory", "damaged file", "disk"],
)
def test_run_is_complete_without_the_metrics(
    error: Exception,
    reason: str,
    tiny: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(ClipMetrics, "run", raises(error))
    assert train(*overrides(tiny, images, run)) == 0
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == 1
    assert [metrics[name] for name in ClipMetrics.names] == [None] * len(ClipMetrics.names)
    assert all(reason in metrics["reasons"][name] for name in ClipMetrics.names)
    output = capsys.readouterr()
    assert f"WARNING: evaluation: {'out of memory' if reason == 'out of memory' else ''}" in output.out + output.err
    assert f"measure it with: sdtune evaluate run={run}" in output.out + output.err
    assert (run / "export" / "kohya" / "mine.safetensors").is_file()
    monkeypatch.undo()
    assert sdtune("evaluate", str(run), "clip=pocket", f"hydra.run.dir={tmp_path / 'evaluation'}") == 0
    assert json.loads((tmp_path / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["clip_image"]


def test_bug_in_the_evaluation_leaves_artifact_card_and_exports(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(ClipMetrics, "run", raises(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        train(*overrides(tiny, images, run))
    assert (run / "artifact" / "mine.safetensors").is_file()
    assert "# mine" in (run / "artifact" / "README.md").read_text(encoding="utf-8")
    assert (run / "export" / "kohya" / "mine.safetensors").is_file()
    assert not (run / "metrics.json").exists()


def test_resumed_run_may_change_the_evaluation(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ClipMetrics, "run", raises(ZeroDivisionError("a bug")))
        with pytest.raises(ZeroDivisionError):
            train(*overrides(tiny, images, run))
    assert train(f"resume={run}", "evaluation=none") == 0
    assert "clip_image" not in json.loads((run / "metrics.json").read_text(encoding="utf-8"))
