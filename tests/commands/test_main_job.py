"""The main job, cut short: every metric that it promises is there."""

from __future__ import annotations

import json
from pathlib import Path

from running import evaluate, train


def test_the_demos_recipe_leaves_its_figures(tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = [
        "trainer.max_steps=2",
        "trainer.log_every_n_steps=1",
        "evaluation.images=4",
        "evaluation.sampling.steps=2",
    ]
    own = ["experiment=lora_subject", f"hydra.run.dir={run}", "evaluation.class_images=4", *short]
    assert train(*own, "callbacks.samples.seeds=[0]", "callbacks.samples.sampling.steps=2") == 0
    figures = json.loads((run / "metrics.json").read_text())
    both = ("subject_accuracy", "background_accuracy", "clip_image", "clip_text", "prior_leak")
    for key in (*both, *(f"base_{key}" for key in both), "ceiling_subject_accuracy", "subject_gain", "class_diversity"):
        assert isinstance(figures[key], float), key
    assert figures["ceiling_subject_accuracy"] > 0.9
    assert figures["steps"] == 2
    assert figures["trainable_parameters"] == 1_460_224
    artifact = sum(f.stat().st_size for f in (run / "artifact").glob("*.safetensors"))
    assert figures["artifact_bytes"] == artifact < 20_000_000
    assert 100_000_000 < figures["peak_memory_bytes"] < 10_000_000_000
    assert figures["images_per_second"] == 8 / figures["median_step_seconds"]
    assert {"before_after.png", "step00000000.png", "step00000002.png"} <= {p.name for p in (run / "samples").iterdir()}
    readings = json.loads((run / "evaluation" / "readings.json").read_text())
    assert len(readings["subject_accuracy"]) == len(readings["base_prior_leak"]) == 4

    # Measured again from its artifact, it has the same metrics.
    assert evaluate(f"run={run}", f"hydra.run.dir={tmp_path}/again") == 0
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert again == figures
