"""Comparison of the methods of a sweep: ``python -m experiments.compare_methods.compare SWEEP``.

SWEEP is the folder of a finished sweep=compare_methods. Writes to ``experiments/compare_methods/``: the tables between
the two marks of README.md, results.json and image grids.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.compare_methods.claims import METHODS, SUBJECT_METHODS
from experiments.marked_page import rewrite
from sdtune.errors import UserError
from sdtune.files import write_json
from sdtune.images.grids import grid, save_png
from sdtune.log_filters import quiet, quiet_libraries
from sdtune.reporting import Run, collect


def gathered(sweep: Path) -> dict[str, list[Run]]:
    """Runs of each method, one per seed.

    Raises:
        UserError: a run is missing, unfinished or not of sweep=compare_methods.
    """
    runs_by_method: dict[str, list[Run]] = {method: [] for method in METHODS}
    for run in collect(sweep):
        chosen = [o.rpartition("/")[2] for o in run.overrides if o.startswith("experiment=compare_methods/")]
        if len(chosen) != 1 or chosen[0] not in runs_by_method:
            raise UserError(
                f"{run.folder} is not a run of sweep=compare_methods", remedy="use the folder of that sweep"
            )
        if run.state != "done":
            raise UserError(f"{run.folder} is {run.state}", remedy=f"continue it with: sdtune train -m resume={sweep}")
        runs_by_method[chosen[0]].append(run)
    seeds = {method: {run.config.get("seed") for run in runs} for method, runs in runs_by_method.items()}
    incomplete = next((method for method in METHODS if seeds[method] != set.union(*seeds.values())), None)
    if incomplete is not None:
        raise UserError(
            f"{sweep} has fewer seeds of {incomplete} than of other methods",
            remedy=f"continue it with: sdtune train -m resume={sweep}",
        )
    return runs_by_method


def images(runs: Mapping[str, Sequence[Run]], folder: Path) -> None:
    """Write ``subject.png`` (samples of the base and of each method for one seed) and ``controlnet.png``."""
    first = {method: runs[method][0].last_images() for method in SUBJECT_METHODS}
    before = runs["lora"][0].first_images()
    prompts = [p.prompt for p in first["lora"]]
    rows = [[np.asarray(Image.open(p.file).convert("RGB")) for p in row] for row in (before, *first.values())]
    save_png(grid(rows, ["before", *SUBJECT_METHODS], prompts), folder / "subject.png")
    shutil.copy2(runs["controlnet"][0].folder / "samples" / "before_after.png", folder / "controlnet.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare_methods.compare", description=__doc__)
    parser.add_argument("sweep", type=Path, help="folder of a finished sweep=compare_methods")
    parser.add_argument("--into", type=Path, default=Path("experiments/compare_methods"))
    arguments = parser.parse_args()
    try:
        runs = gathered(arguments.sweep)
    except UserError as error:
        print(f"sdtune: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    quiet()
    from experiments.compare_methods.measured import measured, planned
    from experiments.compare_methods.page import page

    quiet_libraries()
    metrics = {method: measured(method_runs) for method, method_runs in runs.items()}
    plans = {method: planned(method) for method in METHODS}
    write_json(
        arguments.into / "results.json",
        {
            "measured": {m: {key: vars(value) for key, value in values.items()} for m, values in metrics.items()},
            "planned_sd15": plans,
        },
    )
    images(runs, arguments.into)
    file = arguments.into / "README.md"
    rewrite(file, page(metrics, plans, len(runs["lora"])))
    print(file)


if __name__ == "__main__":
    main()
