"""The recipe ``lora_subject`` with few steps writes all its metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from running import evaluate, train
from sdtune.evaluation import ClipMetrics


def test_lora_subject_recipe_writes_all_metrics(tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = [
        "trainer.max_steps=2",
        "trainer.log_every_n_steps=1",
        "evaluation.images=4",
        "evaluation.sampling.steps=2",
    ]
    command = ["experiment=lora_subject", f"hydra.run.dir={run}", "evaluation.class_images=4", *short]
    assert train(*command, "callbacks.samples.seeds=[0]", "callbacks.samples.sampling.steps=2") == 0
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    before_and_after = ("subject_accuracy", "background_accuracy", "clip_image", "clip_text", "prior_leak")
    for key in (
        *before_and_after,
        *(f"base_{key}" for key in before_and_after),
        "ceiling_subject_accuracy",
        "subject_gain",
        "class_diversity",
    ):
        assert isinstance(metrics[key], float), key
    assert metrics["ceiling_subject_accuracy"] > 0.9
    assert metrics["steps"] == 2
    assert metrics["trainable_parameters"] == 1_460_224
    artifact = sum(f.stat().st_size for f in (run / "artifact").glob("*.safetensors"))
    assert metrics["artifact_bytes"] == artifact < 20_000_000
    assert 100_000_000 < metrics["peak_memory_bytes"] < 10_000_000_000
    assert metrics["images_per_second"] == 8 / metrics["median_step_seconds"]
    assert {"before_after.png", "step00000000.png", "step00000002.png"} <= {p.name for p in (run / "samples").iterdir()}
    readings = json.loads((run / "evaluation" / "readings.json").read_text(encoding="utf-8"))
    assert len(readings["subject_accuracy"]) == len(readings["base_prior_leak"]) == 4

    # sdtune evaluate measures the same metrics from the artifact.
    assert evaluate(f"run={run}", f"hydra.run.dir={tmp_path}/remeasured") == 0
    remeasured = json.loads((tmp_path / "remeasured" / "evaluation.json").read_text(encoding="utf-8"))
    assert remeasured == metrics


def test_pocket_run_without_an_evaluation_is_measured_with_the_clip_of_pocket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clips = tmp_path / "run", []

    def measure(self: ClipMetrics, *_: Any) -> dict[str, float]:
        clips.append(self.clip)
        return {"clip_image": 0.5}

    monkeypatch.setattr(ClipMetrics, "run", measure)
    settings = ["trainer.max_steps=1", "evaluation=none", "callbacks.samples=null", f"hydra.run.dir={run}"]
    assert train("data=pocket_subject", *settings) == 0
    assert evaluate(f"run={run}", f"hydra.run.dir={tmp_path}/measured") == 0
    assert clips == ["pocket"]
    assert evaluate(f"run={run}", "clip=other", f"hydra.run.dir={tmp_path}/other") == 2
