"""``python -m experiments.compare_methods.compare SWEEP``, of a sweep=compare_methods.

Writes ``experiments/compare_methods/``: the tables of README.md between its two marks, results.json and images.
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
    """The runs of each method, a run a seed; UserError where one is missing or has not ended."""
    found: dict[str, list[Run]] = {method: [] for method in METHODS}
    for run in collect(sweep):
        chosen = [o.rpartition("/")[2] for o in run.overrides if o.startswith("experiment=compare_methods/")]
        if len(chosen) != 1 or chosen[0] not in found:
            raise UserError(f"{run.folder} is no run of sweep=compare_methods; name the folder of that sweep")
        if run.state != "done":
            raise UserError(f"{run.folder} is {run.state}; sdtune train -m resume={sweep} runs what is missing")
        found[chosen[0]].append(run)
    seeds = {method: {run.config.get("seed") for run in runs} for method, runs in found.items()}
    fewer = next((method for method in METHODS if seeds[method] != set.union(*seeds.values())), None)
    if fewer is not None:
        raise UserError(f"{sweep} lacks seeds of {fewer}; sdtune train -m resume={sweep} runs what is missing")
    return found


def images(found: Mapping[str, Sequence[Run]], folder: Path) -> None:
    """``subject.png``, each method's samples of one seed under the base's, and ``controlnet.png``."""
    first = {method: [p for p in found[method][0].images if p.when == "after"] for method in SUBJECT_METHODS}
    before = [p for p in found["lora"][0].images if p.when == "before"]
    prompts = [p.prompt for p in first["lora"]]
    rows = [[np.asarray(Image.open(p.file).convert("RGB")) for p in row] for row in (before, *first.values())]
    save_png(grid(rows, ["before", *SUBJECT_METHODS], prompts), folder / "subject.png")
    shutil.copy2(found["controlnet"][0].folder / "samples" / "before_after.png", folder / "controlnet.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare_methods.compare", description=__doc__)
    parser.add_argument("sweep", type=Path, help="folder of a sweep=compare_methods")
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
    found = {method: measured(own) for method, own in runs.items()}
    plans = {method: planned(method) for method in METHODS}
    write_json(
        arguments.into / "results.json",
        {
            "measured": {m: {key: vars(value) for key, value in values.items()} for m, values in found.items()},
            "planned_sd15": plans,
        },
    )
    images(runs, arguments.into)
    file = arguments.into / "README.md"
    rewrite(file, page(found, plans, len(runs["lora"])))
    print(file)


if __name__ == "__main__":
    main()
