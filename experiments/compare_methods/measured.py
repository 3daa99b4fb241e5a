"""Metrics of a method over seeds, and the resources that ``sdtune plan`` counts for Stable Diffusion 1.5."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np
from hydra import compose, initialize_config_dir

from experiments.compare_methods.value import Value
from sdtune.commands.plan import checked_plan, plan_request
from sdtune.paths import config_folder
from sdtune.planning.memory import Switches, memory
from sdtune.planning.request import count
from sdtune.pocket.evaluation.intervals import intervals
from sdtune.reporting import Run
from sdtune.runs.layout import READINGS


def measured(runs: Sequence[Run]) -> dict[str, Value]:
    """Metrics of a method over its seeds, with 95% intervals if per-image values exist, else standard deviations."""
    metrics: dict[str, Value] = {}
    for key in dict.fromkeys(key for run in runs for key in run.metrics):
        values = [run.metrics[key] for run in runs if key in run.metrics]
        metrics[key] = Value(fmean(values), spread=stdev(values) if len(values) > 1 else None)
    seconds = [run.metrics["median_step_seconds"] * run.metrics["steps"] for run in runs]
    metrics["seconds"] = Value(fmean(seconds), spread=stdev(seconds) if len(seconds) > 1 else None)
    per_run = [json.loads((run.folder / "evaluation" / READINGS).read_text(encoding="utf-8")) for run in runs]
    readings = {key: np.array([values[key] for values in per_run], dtype=float) for key in per_run[0]}
    for key, (mean, low, high) in intervals(readings, runs[0].metrics.get("ceiling_subject_accuracy")).items():
        metrics[key] = Value(mean, interval=(low, high))
    return metrics


def planned(method: str) -> dict[str, float]:
    """Counts of ``sdtune plan experiment=sd15_<method>``: parameters, artifact, peak per device, TFLOP per step."""
    with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        job = checked_plan(compose("plan", [f"experiment=sd15_{method}"], return_hydra_config=True))
    figures = count(plan_request(job))
    hardware = job.config["hardware"]
    # The optimizer state is counted as configured in the recipe, including 8-bit optimizers.
    switches = Switches(checkpointing=hardware["gradient_checkpointing"], offload=hardware["offload"])
    cost = figures.checkpointed if switches.checkpointing else figures.plain
    return {
        "trainable_parameters": figures.total.trained,
        "artifact_bytes": figures.artifact,
        "peak_memory_bytes": memory(figures, switches, job.accumulation, 1).peak,
        "tflop": cost.flop * job.accumulation / 1e12,
        "steps": job.config["trainer"]["max_steps"],
    }
