"""A method's metrics over seeds, and what ``sdtune plan`` counts for it at Stable Diffusion's size."""

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
    """A method's metrics over its seeds."""
    found: dict[str, Value] = {}
    for key in dict.fromkeys(key for run in runs for key in run.metrics):
        values = [run.metrics[key] for run in runs if key in run.metrics]
        found[key] = Value(fmean(values), spread=stdev(values) if len(values) > 1 else None)
    seconds = [run.metrics["median_step_seconds"] * run.metrics["steps"] for run in runs]
    found["seconds"] = Value(fmean(seconds), spread=stdev(seconds) if len(seconds) > 1 else None)
    single = [json.loads((run.folder / "evaluation" / READINGS).read_text()) for run in runs]
    readings = {key: np.array([values[key] for values in single], dtype=float) for key in single[0]}
    for key, (mean, low, high) in intervals(readings, runs[0].metrics.get("ceiling_subject_accuracy")).items():
        found[key] = Value(mean, interval=(low, high))
    return found


def planned(method: str) -> dict[str, float]:
    """What ``sdtune plan experiment=sd15_<method>`` counts: parameters, artifact, peak a device, TFLOP a step."""
    with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        job = checked_plan(compose("plan", [f"experiment=sd15_{method}"], return_hydra_config=True))
    figures = count(plan_request(job))
    hardware = job.config["hardware"]
    # The optimizer's state is counted as the recipe configures it, 8-bit or not.
    switches = Switches(checkpointing=hardware["gradient_checkpointing"], offload=hardware["offload"])
    cost = figures.checkpointed if switches.checkpointing else figures.plain
    return {
        "trainable_parameters": figures.total.trained,
        "artifact_bytes": figures.artifact,
        "peak_memory_bytes": memory(figures, switches, job.accumulation, 1).peak,
        "tflop": cost.flop * job.accumulation / 1e12,
        "steps": job.config["trainer"]["max_steps"],
    }
