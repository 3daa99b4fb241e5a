"""Tables of README.md from the results of a check: ``python -m experiments.gpu.page OUT/gpu.json``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.marked_page import rewrite
from sdtune.errors import UserError
from sdtune.files import read_json, write_json

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Table:
    """The table of a check.

    Args:
        columns: heading -> key of the row and format of its value.
    """

    title: str
    first: str
    columns: Mapping[str, tuple[str, str]]


_MEMORY = {"peak, GiB": ("peak_gib", ".2f"), "reserved, GiB": ("reserved_gib", ".2f")}
_PLANNED = {"planned, GiB": ("planned_gib", ".2f")}
_STEP = {"step, ms": ("step_ms", ",.1f")}

TABLES = {
    "methods": Table(
        "Losses and gradient norms against the CPU",
        "method",
        {"largest relative difference": ("worst_relative_difference", ".1e")},
    ),
    "waits": Table("Lines that wait for the GPU", "training", {"steps": ("steps", "d"), "waits": ("waits", "")}),
    "speed": Table(
        "Time and memory of a step",
        "training",
        {
            **_STEP,
            "host, ms": ("host_ms", ",.1f"),
            **_MEMORY,
            **_PLANNED,
            "peak / planned": ("peak_of_planned", ".2f"),
        },
    ),
    "cards": Table("Complete runs on smaller GPUs", "GPU and run", {**_STEP, **_MEMORY, **_PLANNED}),
    "resume": Table("Resumed against uninterrupted", "run", {"files": ("files", "d"), "different": ("different", "")}),
    "sweep": Table("Shared sweep", "sweep", {"seconds per step of a run": ("seconds_per_run_step", ".4f")}),
    "sampling": Table(
        "Sampling with a LoRA",
        "model",
        {
            "images per second": ("images_per_second", ".2f"),
            "denoising steps": ("denoising_steps", "d"),
            "peak, GiB": ("peak_gib", ".2f"),
        },
    ),
    "diffusers": Table(
        "SD 1.5 LoRA, next to diffusers' script", "trainer", {**_STEP, "peak, GiB": ("peak_gib", ".2f")}
    ),
}


def lines(results: Mapping[str, Any]) -> list[str]:
    """Markdown lines of the tables of ``results``, the content of gpu.json."""
    machine = results["machine"]
    text = [
        f"{machine['gpu']} ({machine['gib']:.1f} GiB, compute capability {machine['capability']}),"
        f" {machine['cpus']} CPU cores, torch {machine['torch']} with CUDA {machine['cuda']},"
        f" diffusers {machine['diffusers']}; the check took {results['seconds']:.0f} s."
    ]
    for check, table in TABLES.items():
        rows = [row for row in results["rows"] if row["check"] == check]
        if rows:
            text += ["", f"## {table.title}", "", *_table(table, rows)]
    return text


def _table(table: Table, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    headings = [table.first, "as expected", *table.columns]
    text = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in rows:
        cells = [row["name"], _outcome(row)]
        cells += [_cell(row.get(key), form) for key, form in table.columns.values()]
        text.append(f"| {' | '.join(cells)} |")
    return text


def _outcome(row: Mapping[str, Any]) -> str:
    """Whether the row is as expected, with the reason if it was not measured."""
    if "skipped" in row:
        return _escaped(f"not measured: {row['skipped']}")
    return "yes" if row["ok"] else _escaped(f"**no** {row.get('error', '')}".strip())


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return _escaped(", ".join(f"{key} ({count})" for key, count in value.items())) or "none"
    return _escaped(value) if isinstance(value, str) else format(value, form)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def write(file: Path, folder: Path = HERE) -> None:
    """Write the tables of ``file`` into README.md of ``folder``, and its content into results.json next to it.

    Raises:
        UserError: ``file`` is missing or damaged, or the page has no marks.
    """
    results = read_json(file)
    rewrite(folder / "README.md", lines(results))
    write_json(folder / "results.json", results)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m experiments.gpu.page OUT/gpu.json")
    try:
        write(Path(sys.argv[1]))
    except UserError as error:
        raise SystemExit(f"gpu page: {error}") from error


if __name__ == "__main__":
    main()
