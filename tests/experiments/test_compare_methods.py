"""Comparison of the methods: generated page, verdicts and refused sweeps."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.compare_methods import compare as command
from experiments.compare_methods import measured as measured_module
from experiments.compare_methods.claims import (
    ASSERTED,
    CLAIMS,
    METHODS,
    SUBJECT_METHODS,
    at_least,
    at_most,
    both,
    less,
    suits,
)
from experiments.compare_methods.measured import measured, planned
from experiments.compare_methods.page import page
from experiments.compare_methods.value import Value
from sdtune.errors import UserError
from sdtune.images.grids import save_png

GAINS = {"textual_inversion": 0.4, "lora": 0.9, "dreambooth": 0.7, "full": 0.9}
LEAKS = {"textual_inversion": 0.0, "lora": 0.8, "dreambooth": 0.0, "full": 0.9}
SIZES = {"textual_inversion": 10, "lora": 1_000, "dreambooth": 90_000, "full": 90_000, "controlnet": 40_000}
PLAN = {"trainable_parameters": 7, "artifact_bytes": 8, "peak_memory_bytes": 9, "tflop": 1.5, "steps": 10}


def readings(method: str) -> dict[str, list[float]]:
    if method == "controlnet":
        return {
            "control_agreement": [0.8] * 10,
            "control_agreement_shuffled": [0.3] * 10,
            "object_accuracy": [1.0] * 10,
            "background_accuracy": [1.0] * 10,
        }
    hits, leaked = round(10 * GAINS[method]), round(10 * LEAKS[method])
    return {
        "base_subject_accuracy": [0.0] * 10,
        "subject_accuracy": [1.0] * hits + [0.0] * (10 - hits),
        "background_accuracy": [1.0] * 10,
        "prior_leak": [1.0] * leaked + [0.0] * (10 - leaked),
        "class_distance": [0.4] * 10,
        "base_class_distance": [0.5] * 10,
    }


def write_run(folder: Path, method: str, seed: int) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(f"seed: {seed}\nmethod: {{name: {method}}}\n", encoding="utf-8")
    overrides = [f"seed={seed}", f"experiment=compare_methods/{method}", "sweep=compare_methods"]
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides), encoding="utf-8")
    (folder / "metrics.csv").write_text("step,loss\n1,0.5\n", encoding="utf-8")
    metrics: dict[str, Any] = {key: sum(v) / len(v) for key, v in readings(method).items()}
    metrics |= {"trainable_parameters": SIZES[method], "artifact_bytes": 4 * SIZES[method], "steps": 100}
    metrics |= {"peak_memory_bytes": 2**30 + SIZES[method], "median_step_seconds": 0.5 + 0.1 * seed}
    metrics |= {"prior_drift": LEAKS.get(method, 0), "ceiling_subject_accuracy": 1.0, "validation_loss": None}
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "readings.json").write_text(json.dumps(readings(method)), encoding="utf-8")
    for when in ("step00000000", "step00000100"):
        for i in range(2):
            image = np.full((8, 8, 3), 100 * i, np.uint8)
            save_png(image, folder / "samples" / when / f"{i}.png", {"prompt": f"a thing {i}", "seed": "0"})
    save_png(np.zeros((8, 8, 3), np.uint8), folder / "samples" / "before_after.png")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for seed in (0, 1):
        for i, method in enumerate(METHODS):
            write_run(tmp_path / "sweep" / str(seed * len(METHODS) + i), method, seed)
    return tmp_path / "sweep"


def test_page_has_the_metrics_of_the_runs(sweep: Path) -> None:
    metrics = {method: measured(runs) for method, runs in command.gathered(sweep).items()}
    assert metrics["lora"]["subject_gain"].mean == pytest.approx(0.9)
    assert metrics["lora"]["seconds"].mean == pytest.approx(55)
    assert metrics["lora"]["seconds"].shown("seconds") == "55 s ± 7 s"
    plans = dict.fromkeys(METHODS, PLAN)
    lines = page(metrics, plans, 2)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}
    for claim in CLAIMS:
        assert claim.text in rows
    assert "| so |" in rows["Textual Inversion trains the fewest parameters and leaves the smallest file"]
    assert "| within the noise |" in rows["Textual Inversion is done soonest"], "all methods take the same time here"
    assert "| within the noise |" in rows["DreamBooth's effect is stronger than LoRA's"]
    assert "| **not so** |" in rows["LoRA leaves the class alone"]
    assert "| so |" in rows["DreamBooth keeps the class, full fine-tuning loses it"]
    text = "\n".join(lines)
    for claims in ASSERTED.values():
        assert f"| {claims.resources} |" in text
    assert "map followed: 0.500" in text


def test_verdict_is_none_within_the_noise() -> None:
    low, high, wide = Value(0.1, spread=0.01), Value(0.3, interval=(0.25, 0.35)), Value(0.2, interval=(0.05, 0.4))
    assert (less(low, high), less(high, low), less(low, wide), less(low, low)) == (True, False, None, None)
    assert less(Value(3.0), Value(3.0)) is False, "counts have no noise"
    assert (at_most(low, 0.2), at_most(high, 0.2), at_most(wide, 0.2)) == (True, False, None)
    assert (at_least(high, 0.2), at_least(low, 0.2), at_least(wide, 0.2)) == (True, False, None)
    assert (both(True, True), both(True, None), both(None, False)) == (True, None, False)


def test_missing_seeds_of_a_method_are_refused(sweep: Path) -> None:
    shutil.rmtree(sweep / "6")
    with pytest.raises(UserError, match=r"has fewer seeds of lora than of other methods"):
        command.gathered(sweep)


def test_use_of_a_method_follows_from_its_metrics() -> None:
    follows_prompt = {"background_accuracy": 1.0}
    assert suits({"subject_gain": 0.9, "prior_leak": 0.5, **follows_prompt}) == "the subject itself, its class lost"
    assert (
        suits({"subject_gain": 0.3, "prior_leak": 0.0, **follows_prompt}) == "a likeness of the subject, its class kept"
    )
    assert suits({"control_less_shuffled": 0.5, "background_accuracy": 0.2}).endswith(", prompts hardly followed")


def test_compare_replaces_only_the_section_between_the_marks(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into = tmp_path / "page"
    into.mkdir()
    (into / "README.md").write_text("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(measured_module, "planned", lambda method: PLAN)
    monkeypatch.setattr(sys, "argv", ["comparison", str(sweep), "--into", str(into)])
    command.main()
    written = (into / "README.md").read_text(encoding="utf-8")
    assert written.startswith("before\n<!-- measured -->\n")
    assert written.endswith("<!-- /measured -->\nafter\n")
    assert "\nold\n" not in written
    results = json.loads((into / "results.json").read_text(encoding="utf-8"))
    assert results["measured"]["full"]["prior_leak"]["mean"] == pytest.approx(0.9)
    assert set(results["planned_sd15"]) == set(METHODS)
    assert (into / "subject.png").is_file()
    assert (into / "controlnet.png").is_file()


def test_unfinished_run_is_refused(sweep: Path) -> None:
    (sweep / "6" / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"sweep/6 is unfinished; continue it with: sdtune train -m resume="):
        command.gathered(sweep)


def test_run_of_another_sweep_is_refused(sweep: Path) -> None:
    (sweep / "0" / ".hydra" / "overrides.yaml").write_text("- experiment=lora_subject\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"sweep/0 is not a run of sweep=compare_methods"):
        command.gathered(sweep)


@pytest.mark.slow
def test_plan_counts_the_shapes_of_stable_diffusion() -> None:
    counts = planned("lora")
    assert counts["trainable_parameters"] == 1_594_368
    assert counts["steps"] == 1500
    assert counts["peak_memory_bytes"] > 2**31


def test_claims_cover_all_methods() -> None:
    assert set(ASSERTED) == set(METHODS) == {*SUBJECT_METHODS, "controlnet"}
