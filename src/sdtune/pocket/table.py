"""A recipe's measured result over several seeds: ``python -m sdtune.pocket.table NAME [--seeds 0 1 2]``.

Runs ``sdtune train experiment=NAME`` once a seed, unless it has been run already, and writes ``experiments/NAME/``: a
table with intervals, the figures of each seed, and the grid of the first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdtune.files import write_json
from sdtune.pocket.evaluation import READINGS
from sdtune.randomness import generator

DRAWS = 2_000
"""Of the bootstrap."""

_COST = ("trainable_parameters", "artifact_bytes", "peak_memory_bytes", "median_step_seconds", "images_per_second")

Readings = Mapping[str, np.ndarray]
"""By figure, float64 [seeds, pictures]."""


def gain(means: Mapping[str, Any], ceiling: float) -> Any:
    """``subject_gain`` from ``subject_accuracy`` and its base."""
    return (means["subject_accuracy"] - means["base_subject_accuracy"]) / (ceiling - means["base_subject_accuracy"])


def intervals(readings: Readings, ceiling: float | None) -> dict[str, tuple[float, float, float]]:
    """Mean and 95% interval of each figure (percentile bootstrap, Efron & Tibshirani 1993, chapter 13).

    Seeds are drawn with replacement, then pictures within each; the base's pictures with those of the trained model,
    since their prompts and seeds are the same.
    """
    seeds, pictures = next(iter(readings.values())).shape
    rng = generator(0, "bootstrap")
    drawn: dict[str, list[float]] = {key: [] for key in readings}
    for _ in range(DRAWS):
        rows = rng.integers(seeds, size=(seeds, 1))
        columns = rng.integers(pictures, size=(seeds, pictures))
        for key, values in readings.items():
            drawn[key].append(float(values[rows, columns % values.shape[1]].mean()))
    centre = {key: float(values.mean()) for key, values in readings.items()}
    spread = {key: np.array(values) for key, values in drawn.items()}
    if ceiling is not None and {"subject_accuracy", "base_subject_accuracy"} <= readings.keys():
        centre["subject_gain"], spread["subject_gain"] = gain(centre, ceiling), gain(spread, ceiling)
    return {
        key: (centre[key], float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975)))
        for key, values in spread.items()
    }


def text(name: str, seeds: Sequence[int], runs: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    """The page ``experiments/<name>/README.md``."""
    lines = [
        f"# {name}",
        "",
        f"`python -m sdtune.pocket.table {name} --seeds {' '.join(map(str, seeds))}` runs [the recipe](../{name}.yaml)",
        "once a seed and writes this page. The intervals are by bootstrap over seeds and pictures; figures of pocket's",
        "world are not comparable with published ones.",
        "",
        "| figure | mean | 95% interval |",
        "|---|---|---|",
    ]
    lines += [f"| {key} | {mean:.3f} | {low:.3f} to {high:.3f} |" for key, (mean, low, high) in sorted(found.items())]
    others = [k for k in runs[0] if k not in found and k not in _COST and k not in ("steps", "reasons")]
    rows = [(key, [run[key] for run in runs]) for key in (*others, *_COST) if all(run.get(key) for run in runs)]
    lines += ["", f"| figure | {' | '.join(f'seed {seed}' for seed in seeds)} |", "|---" * (len(seeds) + 1) + "|"]
    lines += [
        f"| {key} | {' | '.join(f'{v:,}' if isinstance(v, int) else f'{v:.3f}' for v in values)} |"
        for key, values in rows
    ]
    return "\n".join([*lines, "", "![Before and after, the first seed](before_after.png)", ""])


def _run(name: str, seed: int, folder: Path) -> dict[str, Any]:
    if not (folder / "metrics.json").is_file():
        command = [sys.executable, "-m", "sdtune.train"]
        begun = any(folder.glob("checkpoints/step*.ckpt"))
        own = [f"resume={folder}"] if begun else [f"experiment={name}", f"seed={seed}", f"hydra.run.dir={folder}"]
        subprocess.run([*command, *own], check=True)
    figures: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sdtune.pocket.table", description="Measure a recipe over seeds.")
    parser.add_argument("name", help="of experiments/<name>.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("outputs/results"), help="folder of the runs")
    arguments = parser.parse_args()
    folders = [arguments.runs / arguments.name / f"seed-{seed}" for seed in arguments.seeds]
    runs = [_run(arguments.name, seed, folder) for seed, folder in zip(arguments.seeds, folders, strict=True)]
    single = [json.loads((folder / "evaluation" / READINGS).read_text()) for folder in folders]
    readings = {key: np.array([values[key] for values in single], dtype=float) for key in single[0]}
    found = intervals(readings, runs[0].get("ceiling_subject_accuracy"))
    target = Path("experiments") / arguments.name
    target.mkdir(parents=True, exist_ok=True)
    (target / "README.md").write_text(text(arguments.name, arguments.seeds, runs, found))
    write_json(target / "metrics.json", dict(zip(map(str, arguments.seeds), runs, strict=True)))
    shutil.copy2(folders[0] / "samples" / "before_after.png", target / "before_after.png")
    print(target / "README.md")


if __name__ == "__main__":
    main()
