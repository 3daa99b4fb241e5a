"""What ``backbone.quantize`` costs on pocket: ``python -m experiments.quantization.table SWEEP``.

Reads the finished jobs of a sweep over ``backbone.quantize`` and ``seed`` and writes ``results.json`` and the table of
``README.md`` in this folder.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from experiments.marked_page import rewrite
from sdtune.config.settings import read_saved_config
from sdtune.errors import UserError
from sdtune.files import write_json

HERE = Path(__file__).parent
METRICS = ("subject_gain", "background_accuracy", "clip_image", "diversity", "memorisation")
LAST_STEPS = 100


def _job(folder: Path) -> tuple[str, dict[str, float]]:
    """Quantization of a finished job, and its metrics with the mean loss of the last steps."""
    config = read_saved_config(folder)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    values = {"loss": fmean(losses[-LAST_STEPS:]), **{key: float(metrics[key]) for key in METRICS}}
    return str(config["backbone"]["quantize"] or "null"), values


def main() -> None:
    [sweep] = sys.argv[1:]
    jobs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for file in sorted(Path(sweep).glob("*/metrics.json")):
        quantization, values = _job(file.parent)
        jobs[quantization].append(values)
    if not jobs:
        raise UserError(f"{sweep} has no finished job", remedy="run make quantization")
    write_json(HERE / "results.json", jobs)
    names = ["loss", *METRICS]
    lines = [f"| `backbone.quantize` | seeds | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for quantization in ("null", "fp8", "int8", "nf4"):
        runs = jobs.get(quantization, [])
        columns = ([run[name] for run in runs] for name in names) if runs else ()
        cells = [f"{fmean(values):.4g} ({min(values):.4g} to {max(values):.4g})" for values in columns]
        lines.append(f"| `{quantization}` | {len(runs)} | {' | '.join(cells)} |")
    rewrite(HERE / "README.md", lines)


if __name__ == "__main__":
    main()
