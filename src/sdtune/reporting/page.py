"""The report as one HTML file that needs no network."""

from __future__ import annotations

import base64
import io
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from sdtune.files import write_text
from sdtune.quoting import shell_override, shell_word
from sdtune.reporting import charts
from sdtune.reporting.collect import Run
from sdtune.reporting.ranking import MetricStatistics, Place, Setting, group_by_setting, metrics, rankings, varied
from sdtune.runs.metrics import LOWER_IS_BETTER, unit

_SIDE = 192
"""Pixels of a sample in the report, at most; a sheet has three times as many a column of it."""

_SHEET = 900
_COLUMNS = 16
"""Of the ranking, at most: the metrics that follow the one to rank by."""

_COSTS = frozenset(
    {"steps", "validation_step", "median_step_seconds", "images_per_second", "seconds_to_best", "shared_with"}
    | set(charts.COSTS)
)
"""They stand last."""


@dataclass(frozen=True)
class Chart:
    """A Plotly figure under its title."""

    title: str
    note: str
    figure: Markup


def write_report(runs: Sequence[Run], folder: Path, title: str) -> Path:
    """``folder/report.html`` of ``runs``, whole or not at all."""
    environment = Environment(
        autoescape=True, loader=PackageLoader("sdtune.reporting", "."), undefined=StrictUndefined, trim_blocks=True
    )
    content = environment.get_template("report.html.j2").render(**_content(runs, folder, title))
    file = folder / "report.html"
    write_text(file, content)
    return file


def _content(runs: Sequence[Run], folder: Path, title: str) -> dict[str, Any]:
    done = [run for run in runs if run.metrics]
    found = group_by_setting(runs)
    tables = rankings(found)
    order = [setting for _, places in tables for setting, *_ in places]
    metric = tables[0][0] if tables else None
    best = order[0] if order else found[0]
    own = list(found[0].own)
    nonce = secrets.token_urlsafe(12)  # a script that came in with a text has none, and does not run
    return {
        "title": title,
        "nonce": nonce,
        "plotly": Markup(get_plotlyjs().replace("</script", "<\\/script")),
        "left": _left(folder),
        "counts": {state: sum(run.state == state for run in runs) for state in dict.fromkeys(r.state for r in runs)},
        "rankings": [ranking_table(metric, places) for metric, places in tables],
        "reasons": _reasons(done),
        "shared": _shared(done),
        "charts": _charts(found, done, metric, nonce),
        "prompts": _prompts(order or found),
        "sheets": [(name, _image(file, _SHEET)) for name, file in best.runs[0].sheets.items()],
        "best": best.label,
        "own": own,
        "runs": [_about(run, folder, setting) for run in runs for setting in found if run in setting.runs],
        "differences": _differences(found, [key for key in varied(runs) if key not in own]),
    }


def _shared(done: Sequence[Run]) -> str:
    """Which runs' costs are not theirs alone."""
    counts = [int(run.metrics["shared_with"]) for run in done if run.metrics.get("shared_with", 1) > 1]
    if not counts:
        return ""
    together = " or ".join(map(str, sorted(set(counts))))
    return (
        f"{len(counts)} of {len(done)} runs trained {together} at once on one backbone (shared_with): their step times,"
        " their peak memory and what follows from them are those of all together."
    )


def _left(folder: Path) -> str:
    """How a sweep that is not at its end goes on."""
    if not (folder / "multirun.yaml").is_file() or (folder / "sweep.json").is_file():
        return ""
    return f"sdtune train -m {shell_override('resume', folder)}"


def ranking_table(metric: str, places: Sequence[Place]) -> dict[str, Any]:
    """The table of settings by ``metric``, best first, as the page shows it."""
    runs = [run for setting, *_ in places for run in setting.runs]
    shown = [m for m in metrics(runs) if m != metric and not m.startswith(("base_", "ceiling_"))]
    # What is the same for all says nothing about which to take.
    shown = [m for m in shown if len(places) == 1 or len({run.metrics.get(m) for run in runs}) > 1]
    ordered = sorted(shown, key=lambda m: m in _COSTS)
    columns, hidden = ordered[:_COLUMNS], ordered[_COLUMNS:]
    rows = [
        {
            "place": i + 1,
            "label": setting.label,
            "figure": _shown(figure, metric),
            "noise": _noise(setting, figure, noise, best=i == 0),
            "cells": [_shown(setting.metric(column), column) for column in columns],
        }
        for i, (setting, figure, noise) in enumerate(places)
    ]
    return {"metric": metric, "lower": metric in LOWER_IS_BETTER, "columns": columns, "hidden": hidden, "rows": rows}


def _noise(setting: Setting, figure: MetricStatistics, within: bool | None, best: bool) -> str:
    """What the row says of its seeds, and of the best one's lead."""
    seeds = len({str(run.config.get("seed")) for run in setting.runs})
    counted = f"{figure.count} of {seeds} seeds" if figure.count < seeds else f"{seeds} seeds" if seeds > 1 else ""
    if best or within is False:
        return counted
    lead = "within the noise" if within else "noise unknown: one seed here or above"
    return f"{counted}, {lead}" if counted else lead


def _shown(figure: MetricStatistics | None, metric: str) -> str:
    if figure is None:
        return ""
    return unit(figure.mean, metric) + (f" ± {unit(figure.spread, metric, 2)}" if figure.spread is not None else "")


def _differences(found: Sequence[Setting], keys: Sequence[str]) -> dict[str, Any]:
    """Of settings whose command lines name recipes: what these change."""
    values = [[_value(setting.runs[0].config.get(key)) for setting in found] for key in keys]
    return {"labels": [s.label for s in found], "rows": list(zip(keys, values, strict=True))}


def _value(value: Any) -> str:
    return "" if value is None else str(value)


def _reasons(runs: Sequence[Run]) -> dict[str, str]:
    return {key: reason for run in runs for key, reason in run.reasons.items()}


def _charts(found: Sequence[Setting], done: Sequence[Run], metric: str | None, nonce: str) -> list[Chart]:
    charted: list[tuple[str, str, go.Figure | None]] = []
    if metric is not None:
        heat = charts.heat_map(found, metrics(done), metric)
        note = "Darker is better. Where several settings share a cell, it is the best of them."
        if heat is None:
            note = "A point a setting. Darker is better."
            heat = charts.plane(found, metric)
        charted.append(("Over the settings", note, heat))
        cost = charts.cost_and_effect(found, metric)
        charted.append(("Cost against effect", "The dotted front holds what nothing else beats in both.", cost))
    charted.append(("Loss", "Smoothed exponentially; one line per run.", charts.curves(found, "loss", 0.95)))
    charted.append(("Validation loss", "", charts.curves(found, "validation_loss", 0.0)))
    return [
        Chart(title, note, _script(figure, f"chart{i}", nonce))
        for i, (title, note, figure) in enumerate(charted)
        if figure is not None
    ]


def _script(figure: go.Figure, place: str, nonce: str) -> Markup:
    """``figure`` as JSON that no text in it can end."""
    data = json.dumps(json.loads(figure.to_json()), allow_nan=False).replace("<", "\\u003c")
    safe = data.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Markup(
        f'<div id="{place}" class="chart"></div><script nonce="{nonce}">'
        f"{{const f={safe};Plotly.newPlot('{place}',f.data,f.layout,{{responsive:true,displaylogo:false}})}}</script>"
    )


def _prompts(order: Sequence[Setting]) -> list[dict[str, Any]]:
    """For each prompt and seed: the base's sample, and each run's, best first."""
    runs = [run for setting in order for run in setting.runs if run.images]
    keys = list(dict.fromkeys((p.prompt, p.seed) for run in runs for p in run.images))
    labels = {run.folder: setting.label for setting in order for run in setting.runs}
    blocks = []
    for prompt, seed in keys:
        shown: list[tuple[str, str]] = []
        for run in runs:
            own = {p.when: p.file for p in run.images if (p.prompt, p.seed) == (prompt, seed)}
            if not shown and "before" in own:
                shown.append(("before", _image(own["before"], _SIDE)))
            if "after" in own:
                again = f", seed {run.config.get('seed')}" if len(runs) > len(order) else ""
                shown.append((labels[run.folder] + again, _image(own["after"], _SIDE)))
        blocks.append({"prompt": prompt, "seed": seed, "shown": shown})
    return blocks


def _image(file: Path, side: int) -> str:
    """A data URI of the image in ``file``, its longer side at most ``side`` pixels."""
    with Image.open(file) as image:
        small = image.convert("RGB")
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, format="WEBP", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def standalone_overrides(overrides: Sequence[str]) -> list[str]:
    """``overrides`` of a sweep's job for a run of its own: no trial without its study, and no pruning."""
    own = [override for override in overrides if not override.startswith("trial=")]
    if len(own) == len(overrides):
        return own
    return [*(o for o in own if not o.startswith("callbacks.pruning=")), "callbacks.pruning=null"]


def _folder(run: Run) -> list[str]:
    return [] if run.config_folder is None else ["-cd", run.config_folder]


def _about(run: Run, folder: Path, setting: Setting) -> dict[str, Any]:
    inside = run.folder.relative_to(folder) if run.folder.is_relative_to(folder) else run.folder
    return {
        "name": str(inside) if inside.parts else run.folder.resolve().name,
        "state": run.state,
        "error": run.error,
        "values": [_value(value) for value in setting.own.values()],
        "command": " ".join(map(shell_word, ["sdtune", "train", *_folder(run), *standalone_overrides(run.overrides)])),
    }
