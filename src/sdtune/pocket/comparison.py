"""The five methods compared: ``python -m sdtune.pocket.comparison SWEEP``, of a sweep=compare_methods.

Writes ``experiments/compare_methods/``: the tables of README.md between its two marks, results.json and pictures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from hydra import compose, initialize_config_dir
from PIL import Image

from sdtune import plan_run
from sdtune.files import write_json
from sdtune.grids import grid, save_png
from sdtune.paths import config_folder
from sdtune.planning import Switches, memory
from sdtune.pocket.evaluation import READINGS
from sdtune.pocket.folklore import ASSERTED, CLAIMS, COSTS, METHODS, SUBJECT_METHODS, suits
from sdtune.pocket.table import BEGIN, END, intervals
from sdtune.reporting import Run, collect

_EFFECT = (
    "subject_gain", "background_accuracy", "clip_image", "clip_text", "diversity", "memorisation", "prior_leak",
    "prior_drift", "class_diversity", "validation_loss",
)  # fmt: skip
_STRUCTURE = ("control_agreement", "control_agreement_shuffled", "control_less_shuffled", "object_accuracy",
              "background_accuracy", "validation_loss")  # fmt: skip
_COSTS = (*COSTS, "seconds_to_best")


@dataclass(frozen=True)
class Value:
    """A figure over the seeds: its mean, and an interval's ends (95%, by bootstrap) or a standard deviation."""

    mean: float
    interval: tuple[float, float] | None = None
    spread: float | None = None

    def shown(self, figure: str) -> str:
        """Mean and spread, in the unit that suits ``figure``."""
        if self.interval is not None:
            return f"{self.mean:.3f} ({self.interval[0]:.3f} to {self.interval[1]:.3f})"
        spread = f" ± {_unit(self.spread, figure)}" if self.spread else ""
        return _unit(self.mean, figure) + spread


def _unit(value: float, figure: str) -> str:
    if figure.endswith("_bytes"):
        return f"{value / 1024**2:,.2f} MiB" if value < 1024**2 else f"{value / 1024**2:,.0f} MiB"
    if figure.startswith("seconds"):
        return f"{value:,.0f} s"
    if figure == "trainable_parameters":
        return f"{value:,.0f}"
    return f"{value:.4f}"


def gathered(sweep: Path) -> dict[str, list[Run]]:
    """The runs of each method, a run a seed; ValueError where one is missing or has not ended."""
    found: dict[str, list[Run]] = {method: [] for method in METHODS}
    for run in collect(sweep):
        chosen = [o.rpartition("/")[2] for o in run.overrides if o.startswith("experiment=compare_methods/")]
        if len(chosen) != 1 or chosen[0] not in found:
            raise ValueError(f"{run.folder} is no run of sweep=compare_methods; name the folder of that sweep")
        if run.state != "done":
            raise ValueError(f"{run.folder} is {run.state}; sdtune train -m resume={sweep} runs what is missing")
        found[chosen[0]].append(run)
    missing = next((method for method, runs in found.items() if not runs), None)
    if missing is not None:
        raise ValueError(f"{sweep} has no run of {missing}; sdtune train -m resume={sweep} runs what is missing")
    return found


def measured(runs: Sequence[Run]) -> dict[str, Value]:
    """A method's figures over its seeds."""
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
        job = plan_run.job(compose("plan", [f"experiment=sd15_{method}"], return_hydra_config=True))
    figures = plan_run.figures(job)
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


def page(found: Mapping[str, Mapping[str, Value]], plans: Mapping[str, Mapping[str, float]], seeds: int) -> list[str]:
    """The tables."""
    means = {method: {key: value.mean for key, value in values.items()} for method, values in found.items()}
    lines = [f"Over {seeds} seed{'s' if seeds > 1 else ''}:", ""]
    lines += _table(
        ["method", "resources, said", "measured", "effect, said", "measured", "suits, said", "measured"],
        [
            [method, said.resources, _resources(found[method]), said.effect, _effect(found[method]), said.suits,
             suits(means[method])]
            for method, said in ASSERTED.items()
        ],
    )  # fmt: skip
    lines += ["", "What they need here:", ""]
    lines += _figures(found, _COSTS)
    lines += [
        "",
        "What `sdtune plan experiment=sd15_...` counts for Stable Diffusion 1.5 at 512x512:",
        "",
    ]
    lines += _table(
        ["method", "trained parameters", "artifact", "peak a device", "TFLOP a step", "steps"],
        [
            [
                f"[{method}](../sd15_{method}.yaml)",
                *(_unit(plan[key], key) for key in ("trainable_parameters", "artifact_bytes", "peak_memory_bytes")),
                f"{plan['tflop']:.2f}",
                f"{plan['steps']:,}",
            ]
            for method, plan in plans.items()
        ],
    )
    lines += ["", "What they do to the subject and to its class:", ""]
    lines += _figures({method: found[method] for method in SUBJECT_METHODS}, _EFFECT)
    lines += ["", "What a map does, on scenes of its own:", ""]
    lines += _figures({"controlnet": found["controlnet"]}, _STRUCTURE)
    lines += ["", "What is usually said, and what these figures say to it:", ""]
    lines += _table(
        ["saying", "here", "by"],
        [
            [
                claim.text,
                "so" if claim.holds(means) else "**not so**",
                "; ".join(
                    f"{figure}: " + ", ".join(f"{m} {found[m][figure].shown(figure)}" for m in claim.methods)
                    for figure in claim.figures
                ),
            ]
            for claim in CLAIMS
        ],
    )
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _figures(found: Mapping[str, Mapping[str, Value]], keys: Sequence[str]) -> list[str]:
    shown = [key for key in keys if any(key in values for values in found.values())]
    cells = {m: [v[key].shown(key) if key in v else "" for key in shown] for m, v in found.items()}
    return _table(["method", *shown], [[method, *row] for method, row in cells.items()])


def _resources(values: Mapping[str, Value]) -> str:
    parts = {key: values[key].shown(key) for key in COSTS}
    return (
        f"{parts['trainable_parameters']} parameters; file {parts['artifact_bytes']}; memory"
        f" {parts['peak_memory_bytes']}; {parts['seconds']}"
    )


def _effect(values: Mapping[str, Value]) -> str:
    if "control_less_shuffled" in values:
        return f"map followed: {values['control_less_shuffled'].shown('')} above another's map"
    return f"subject_gain {values['subject_gain'].shown('')}; prior_leak {values['prior_leak'].shown('')}"


def pictures(found: Mapping[str, Sequence[Run]], folder: Path) -> None:
    """``subject.png``, each method's samples of one seed under the base's, and ``controlnet.png``."""
    first = {method: [p for p in found[method][0].pictures if p.when == "after"] for method in SUBJECT_METHODS}
    before = [p for p in found["lora"][0].pictures if p.when == "before"]
    prompts = [p.prompt for p in first["lora"]]
    rows = [[np.asarray(Image.open(p.file).convert("RGB")) for p in row] for row in (before, *first.values())]
    save_png(grid(rows, ["before", *SUBJECT_METHODS], prompts), folder / "subject.png")
    shutil.copy2(found["controlnet"][0].folder / "samples" / "before_after.png", folder / "controlnet.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sdtune.pocket.comparison", description=__doc__)
    parser.add_argument("sweep", type=Path, help="folder of a sweep=compare_methods")
    parser.add_argument("--into", type=Path, default=Path("experiments/compare_methods"))
    arguments = parser.parse_args()
    try:
        runs = gathered(arguments.sweep)
    except ValueError as error:
        print(f"sdtune: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    found = {method: measured(own) for method, own in runs.items()}
    plans = {method: planned(method) for method in METHODS}
    write_json(
        arguments.into / "results.json",
        {
            "measured": {m: {key: vars(value) for key, value in values.items()} for m, values in found.items()},
            "planned_sd15": plans,
        },
    )
    pictures(runs, arguments.into)
    file = arguments.into / "README.md"
    start, rest = file.read_text().split(BEGIN)
    lines = page(found, plans, len(runs["lora"]))
    file.write_text("\n".join([start + BEGIN, "", *lines, "", END + rest.split(END)[1]]))
    print(file)


if __name__ == "__main__":
    main()
