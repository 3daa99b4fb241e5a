"""Recipes' measured results over seeds: ``python -m experiments.pocket.table NAME ... [--seeds 0 1 2] [--jobs 2]``.

Runs ``sdtune train experiment=NAME`` once a seed, unless it has been run already, and writes ``experiments/NAME/``: a
table with intervals, the metrics of each seed, and the grid of the first; then the table of all recipes in
``experiments/README.md``.
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
"""Of runs that may have shared the machine: for no table."""

_OVERVIEW = {
    "subject": ("subject_gain", "background_accuracy", "prior_leak", "class_diversity"),
    "style": ("style_accuracy", "object_accuracy", "background_accuracy"),
    "control": ("control_agreement", "control_less_shuffled", "object_accuracy", "background_accuracy"),
}
"""Table -> the metrics that it shows; a recipe stands in the first whose leading metric it has."""


def text(name: str, seeds: Sequence[int], runs: Sequence[Mapping[str, Any]], found: Mapping[str, Interval]) -> str:
    """The page ``experiments/<name>/README.md``."""
    lines = [
        f"# {name}",
        "",
        f"`python -m experiments.pocket.table {name} --seeds {' '.join(map(str, seeds))}`",
        f"runs [the recipe](../{name}.yaml) once a seed and writes this page. The intervals are by bootstrap over",
        "seeds and images, and with three seeds too narrow where these differ more than the images; metrics of",
        "pocket's world are not comparable with published ones.",
        "",
        "| metric | mean | 95% interval |",
        "|---|---|---|",
    ]
    lines += [f"| {key} | {mean:.3f} | {low:.3f} to {high:.3f} |" for key, (mean, low, high) in sorted(found.items())]
    others = [
        k for k in runs[0] if k not in found and k not in (*_COST, *_TIMES, "steps", "validation_step", "reasons")
    ]
    rows = [(key, [run.get(key) for run in runs]) for key in (*others, *_COST)]
    lines += ["", f"| metric | {' | '.join(f'seed {seed}' for seed in seeds)} |", "|---" * (len(seeds) + 1) + "|"]
    lines += [
        f"| {key} | {' | '.join(f'{v:,}' if isinstance(v, int) else f'{v:.3f}' for v in values)} |"
        for key, values in rows
        if all(value is not None for value in values)
    ]
    return "\n".join([*lines, "", "![Before and after, the first seed](before_after.png)", ""])


def overview(folder: Path) -> list[str]:
    """The tables of every recipe that has been measured, from the ``metrics.json`` below ``folder``."""
    contents = {file.parent.name: json.loads(file.read_text()) for file in sorted(folder.glob("*/metrics.json"))}
    found = {name: content["figures"] for name, content in contents.items()}
    lines: list[str] = []
    for figures in _OVERVIEW.values():
        mine = {name: values for name, values in found.items() if figures[0] in values}
        if mine:
            lines += ["", f"| recipe | seeds | {' | '.join(figures)} |", "|---" * (len(figures) + 2) + "|"]
        for name, values in mine.items():
            cells = [f"{v[0]:.3f} ({v[1]:.3f} to {v[2]:.3f})" if (v := values.get(key)) else "" for key in figures]
            lines.append(f"| [{name}]({name}/README.md) | {len(contents[name]['seeds'])} | {' | '.join(cells)} |")
    return lines[1:]


def _run(name: str, seed: int, folder: Path, threads: int | None) -> None:
    command = [sys.executable, "-m", "sdtune", "train"]
    own = [f"experiment={name}", f"seed={seed}", f"hydra.run.dir={folder}"]
    if (folder / "metrics.json").is_file():
        today = subprocess.run([*command, *own, "--cfg", "job"], check=True, capture_output=True, text=True).stdout
        before, now = (
            flat(OmegaConf.to_container(config))
            for config in (OmegaConf.load(folder / ".hydra" / "config.yaml"), OmegaConf.create(today))
        )
        # Settings that are new since, or gone, are passed over: a later version's recipe is still the same.
        other = first_change(before, now)
        if other is not None:
            raise UserError(
                f"{folder}: {name} was another recipe then ({other} {before[other]!r}, now {now[other]!r}); remove the"
                " folder to run it again"
            )
        return
    if any(folder.glob("checkpoints/step*.ckpt")):
        own = [f"resume={folder}"]
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    subprocess.run([*command, *own], check=True, env=environment)


def _write(name: str, seeds: Sequence[int], folders: Sequence[Path], target: Path) -> None:
    runs = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    single = [json.loads((folder / "evaluation" / READINGS).read_text()) for folder in folders]
    readings = {key: np.array([values[key] for values in single], dtype=float) for key in single[0]}
    found = intervals(readings, runs[0].get("ceiling_subject_accuracy"))
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / "README.md", text(name, seeds, runs, found))
    write_json(target / "metrics.json", {"figures": found, "seeds": dict(zip(map(str, seeds), runs, strict=True))})
    shutil.copy2(folders[0] / "samples" / "before_after.png", target / "before_after.png")
    print(target / "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pocket.table", description="Measure recipes over seeds."
    )
    parser.add_argument("names", nargs="+", help="of experiments/<name>.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("outputs/results"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, the cores shared out")
    arguments = parser.parse_args()
    threads = None if arguments.jobs == 1 else max(1, (os.cpu_count() or 1) // arguments.jobs)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        wanted = [
            pool.submit(_run, name, seed, arguments.runs / name / f"seed-{seed}", threads)
            for name, seed in product(arguments.names, arguments.seeds)
        ]
    for run in wanted:
        run.result()
    experiments = Path("experiments")
    for name in arguments.names:
        folders = [arguments.runs / name / f"seed-{seed}" for seed in arguments.seeds]
        _write(name, arguments.seeds, folders, experiments / name)
    rewrite(experiments / "README.md", overview(experiments))


if __name__ == "__main__":
    main()
