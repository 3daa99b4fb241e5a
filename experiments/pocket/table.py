"""Results of recipes over seeds: ``python -m experiments.pocket.table NAME ... [--seeds 0 1 2] [--jobs 2]``.

Runs ``sdtune train experiment=NAME`` once per seed, except for finished runs, and writes ``experiments/NAME/``: a table
with intervals, the metrics of each seed, and the image grid of the first seed. Then updates the tables of all recipes
in ``experiments/README.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from experiments.marked_page import rewrite
from sdtune.errors import UserError
from sdtune.files import write_json, write_text
from sdtune.pocket.evaluation.intervals import Interval, intervals
from sdtune.runs.compare import first_change, flat
from sdtune.runs.layout import READINGS

_COST = ("trainable_parameters", "artifact_bytes", "peak_memory_bytes")
_TIMES = ("median_step_seconds", "images_per_second", "seconds_to_best")
"""Timings, omitted from the tables because runs may have shared the machine."""

_OVERVIEW = {
    "subject": ("subject_gain", "background_accuracy", "prior_leak", "class_diversity"),
    "subjects": ("subject_accuracy/parrot", "subject_accuracy/koala", "mixed_up/parrot", "mixed_up/koala"),
    "style": ("style_accuracy", "object_accuracy", "background_accuracy"),
    "control": ("control_agreement", "control_less_shuffled", "object_accuracy", "background_accuracy"),
}
"""Metrics of each overview table; a recipe appears in every table whose first metric it has."""


def text(name: str, seeds: Sequence[int], runs: Sequence[Mapping[str, Any]], metrics: Mapping[str, Interval]) -> str:
    """Text of ``experiments/<name>/README.md``."""
    lines = [
        f"# {name}",
        "",
        f"`python -m experiments.pocket.table {name} --seeds {' '.join(map(str, seeds))}`",
        f"runs [the recipe](../{name}.yaml) once per seed and generates this page. The intervals are bootstrap",
        "intervals over seeds and images. With three seeds they are too narrow if seeds differ more than images. The",
        "metrics of pocket's world are not comparable with published ones.",
        "",
        "| metric | mean | 95% interval |",
        "|---|---|---|",
    ]
    lines += [f"| {key} | {mean:.3f} | {low:.3f} to {high:.3f} |" for key, (mean, low, high) in sorted(metrics.items())]
    other_keys = [
        k for k in runs[0] if k not in metrics and k not in (*_COST, *_TIMES, "steps", "validation_step", "reasons")
    ]
    rows = [(key, [run.get(key) for run in runs]) for key in (*other_keys, *_COST)]
    lines += ["", f"| metric | {' | '.join(f'seed {seed}' for seed in seeds)} |", "|---" * (len(seeds) + 1) + "|"]
    lines += [
        f"| {key} | {' | '.join(f'{v:,}' if isinstance(v, int) else f'{v:.3f}' for v in values)} |"
        for key, values in rows
        if all(value is not None for value in values)
    ]
    lines += ["", "![Before and after, the first seed](before_after.png)", ""]
    if _is_of_subjects(runs[0]):
        lines += ["Each row has images under the word of one subject:", "", "![Each subject](trained_images.png)", ""]
    return "\n".join(lines)


def _is_of_subjects(run: Mapping[str, Any]) -> bool:
    """Whether a run was evaluated by ``pocket_subjects``."""
    return "subject_gain_lowest" in run


def overview(folder: Path) -> list[str]:
    """Lines of the tables of all measured recipes, from the ``metrics.json`` files below ``folder``."""
    contents = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/metrics.json"))
    }
    metrics = {name: content["figures"] for name, content in contents.items()}
    lines: list[str] = []
    for figures in _OVERVIEW.values():
        recipes = {name: values for name, values in metrics.items() if figures[0] in values}
        if recipes:
            lines += ["", f"| recipe | seeds | {' | '.join(figures)} |", "|---" * (len(figures) + 2) + "|"]
        for name, values in recipes.items():
            cells = [f"{v[0]:.3f} ({v[1]:.3f} to {v[2]:.3f})" if (v := values.get(key)) else "" for key in figures]
            lines.append(f"| [{name}]({name}/README.md) | {len(contents[name]['seeds'])} | {' | '.join(cells)} |")
    return lines[1:]


def _run(name: str, seed: int, folder: Path, threads: int | None) -> None:
    command = [sys.executable, "-m", "sdtune", "train"]
    overrides = [f"experiment={name}", f"seed={seed}", f"hydra.run.dir={folder}"]
    if (folder / "metrics.json").is_file():
        recipe = subprocess.run(
            [*command, *overrides, "--cfg", "job"], check=True, capture_output=True, text=True
        ).stdout
        old, new = (
            flat(OmegaConf.to_container(config))
            for config in (OmegaConf.load(folder / ".hydra" / "config.yaml"), OmegaConf.create(recipe))
        )
        # Settings that a later version of sdtune added or removed are ignored.
        changed_key = first_change(old, new)
        if changed_key is not None:
            raise UserError(
                f"{folder} was run with another version of {name}"
                f" ({changed_key} was {old[changed_key]!r}, is now {new[changed_key]!r})",
                remedy="remove the folder to run it again",
            )
        return
    if any(folder.glob("checkpoints/step*.ckpt")):
        overrides = [f"resume={folder}"]
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    subprocess.run([*command, *overrides], check=True, env=environment)


def _write(name: str, seeds: Sequence[int], folders: Sequence[Path], target: Path) -> None:
    runs = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in folders]
    per_run = [json.loads((folder / "evaluation" / READINGS).read_text(encoding="utf-8")) for folder in folders]
    readings = {key: np.array([values[key] for values in per_run], dtype=float) for key in per_run[0]}
    metrics = intervals(readings, runs[0].get("ceiling_subject_accuracy"))
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / "README.md", text(name, seeds, runs, metrics))
    write_json(target / "metrics.json", {"figures": metrics, "seeds": dict(zip(map(str, seeds), runs, strict=True))})
    shutil.copy2(folders[0] / "samples" / "before_after.png", target / "before_after.png")
    if _is_of_subjects(runs[0]):
        shutil.copy2(folders[0] / "evaluation" / "trained_images.png", target / "trained_images.png")
    print(target / "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pocket.table", description="Measure recipes over seeds."
    )
    parser.add_argument("names", nargs="+", help="recipe names, as in experiments/<name>.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("outputs/results"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs, which share the cores")
    arguments = parser.parse_args()
    threads = None if arguments.jobs == 1 else max(1, (os.cpu_count() or 1) // arguments.jobs)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [
            pool.submit(_run, name, seed, arguments.runs / name / f"seed-{seed}", threads)
            for name, seed in product(arguments.names, arguments.seeds)
        ]
    for future in futures:
        future.result()
    experiments = Path("experiments")
    for name in arguments.names:
        folders = [arguments.runs / name / f"seed-{seed}" for seed in arguments.seeds]
        _write(name, arguments.seeds, folders, experiments / name)
    rewrite(experiments / "README.md", overview(experiments))


if __name__ == "__main__":
    main()
