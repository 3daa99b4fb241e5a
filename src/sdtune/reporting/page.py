"""Render the report as one self-contained HTML file."""

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
"""Maximum side of a sample in the report, in pixels."""

_SHEET = 900
"""Maximum side of an image grid of the evaluation, in pixels."""

_COLUMNS = 16
"""Maximum number of further metrics in a ranking table."""

_COSTS = frozenset(
    {"steps", "validation_step", "median_step_seconds", "images_per_second", "seconds_to_best", "shared_with"}
    | set(charts.COSTS)
)
"""Metrics in the last columns of a ranking table."""


@dataclass(frozen=True)
class Chart:
    """Plotly figure with title and note, as HTML."""

    title: str
    note: str
    figure: Markup


def write_report(runs: Sequence[Run], folder: Path, title: str) -> Path:
    """Write ``folder/report.html`` of ``runs``, atomically, and return its path."""
    environment = Environment(
        autoescape=True, loader=PackageLoader("sdtune.reporting", "."), undefined=StrictUndefined, trim_blocks=True
    )
    content = environment.get_template("report.html.j2").render(**_content(runs, folder, title))
    file = folder / "report.html"
    write_text(file, content)
    return file


def _content(runs: Sequence[Run], folder: Path, title: str) -> dict[str, Any]:
    done = [run for run in runs if run.metrics]
    settings = group_by_setting(runs)
    tables = rankings(settings)
    order = [setting for _, places in tables for setting, *_ in places]
    metric = tables[0][0] if tables else None
    best = order[0] if order else settings[0]
    keys = list(settings[0].own)
    nonce = secrets.token_urlsafe(12)  # a script injected by a caption has no nonce and does not run
    return {
        "title": title,
        "nonce": nonce,
        "plotly": Markup(get_plotlyjs().replace("</script", "<\\/script")),
        "resume_command": _resume_command(folder),
        "counts": {state: sum(run.state == state for run in runs) for state in dict.fromkeys(r.state for r in runs)},
        "rankings": [ranking_table(metric, places) for metric, places in tables],
        "reasons": _reasons(done),
        "shared": _shared(done),
        "charts": _charts(settings, done, metric, nonce),
        "prompts": _prompts(order or settings),
        "sheets": [(name, _image(file, _SHEET)) for name, file in best.runs[0].sheets.items()],
        "best": best.label,
        "varied_keys": keys,
        "runs": [_run_row(run, folder, setting) for run in runs for setting in settings if run in setting.runs],
        "differences": _differences(settings, [key for key in varied(runs) if key not in keys]),
    }


def _shared(done: Sequence[Run]) -> str:
    """Note on runs that shared a backbone, whose costs are measured together."""
    counts = [int(run.metrics["shared_with"]) for run in done if run.metrics.get("shared_with", 1) > 1]
    if not counts:
        return ""
    together = " or ".join(map(str, sorted(set(counts))))
    return (
        f"{len(counts)} of {len(done)} runs trained {together} at the same time on one backbone (shared_with):"
        " their step times, peak memory and derived metrics are those of all these runs together."
    )


def _resume_command(folder: Path) -> str:
    """Command that continues an unfinished sweep; empty otherwise."""
    if not (folder / "multirun.yaml").is_file() or (folder / "sweep.json").is_file():
        return ""
    return f"sdtune train -m {shell_override('resume', folder)}"


def ranking_table(metric: str, places: Sequence[Place]) -> dict[str, Any]:
    """Data of the ranking table by ``metric``, best setting first."""
    runs = [run for setting, *_ in places for run in setting.runs]
    shown = [m for m in metrics(runs) if m != metric and not m.startswith(("base_", "ceiling_"))]
    # Omit metrics that are equal for all settings.
    shown = [m for m in shown if len(places) == 1 or len({run.metrics.get(m) for run in runs}) > 1]
    ordered = sorted(shown, key=lambda m: m in _COSTS)
    columns, hidden = ordered[:_COLUMNS], ordered[_COLUMNS:]
    rows = [
        {
            "place": i + 1,
            "label": setting.label,
            "figure": _shown(statistics, metric),
            "noise": _noise(setting, statistics, noise, best=i == 0),
            "cells": [_shown(setting.metric(column), column) for column in columns],
        }
        for i, (setting, statistics, noise) in enumerate(places)
    ]
    return {"metric": metric, "lower": metric in LOWER_IS_BETTER, "columns": columns, "hidden": hidden, "rows": rows}


def _noise(setting: Setting, statistics: MetricStatistics, within: bool | None, best: bool) -> str:
    """Number of seeds, and whether the difference to the best setting is within the noise."""
    seeds = len({str(run.config.get("seed")) for run in setting.runs})
    counted = (
        f"{statistics.count} of {seeds} seeds" if statistics.count < seeds else f"{seeds} seeds" if seeds > 1 else ""
    )
    if best or within is False:
        return counted
    comparison = "within the noise" if within else "noise unknown (one seed here or in the best row)"
    return f"{counted}, {comparison}" if counted else comparison


def _shown(value: MetricStatistics | None, metric: str) -> str:
    if value is None:
        return ""
    return unit(value.mean, metric) + (f" ± {unit(value.spread, metric, 2)}" if value.spread is not None else "")


def _differences(settings: Sequence[Setting], keys: Sequence[str]) -> dict[str, Any]:
    """Table of the config ``keys`` in which the settings differ, such as those that a recipe sets."""
    values = [[_value(setting.runs[0].config.get(key)) for setting in settings] for key in keys]
    return {"labels": [s.label for s in settings], "rows": list(zip(keys, values, strict=True))}


def _value(value: Any) -> str:
    return "" if value is None else str(value)


def _reasons(runs: Sequence[Run]) -> dict[str, str]:
    return {key: reason for run in runs for key, reason in run.reasons.items()}


def _charts(settings: Sequence[Setting], done: Sequence[Run], metric: str | None, nonce: str) -> list[Chart]:
    charted: list[tuple[str, str, go.Figure | None]] = []
    if metric is not None:
        heat = charts.heat_map(settings, metrics(done), metric)
        note = "Darker is better. A cell with several settings shows the best one."
        if heat is None:
            note = "One point per setting. Darker is better."
            heat = charts.scatter_plot(settings, metric)
        charted.append(("Metric over the varied settings", note, heat))
        cost = charts.cost_and_effect(settings, metric)
        charted.append(
            ("Metric against cost", "Dotted line: Pareto front, the settings that no other beats in both.", cost)
        )
    charted.append(("Loss", "Exponentially smoothed; one line per run.", charts.curves(settings, "loss", 0.95)))
    charted.append(("Validation loss", "", charts.curves(settings, "validation_loss", 0.0)))
    return [
        Chart(title, note, _script(figure, f"chart{i}", nonce))
        for i, (title, note, figure) in enumerate(charted)
        if figure is not None
    ]


def _script(figure: go.Figure, div_id: str, nonce: str) -> Markup:
    """HTML element and script that plot ``figure``; its JSON is escaped, so that no text can close the script."""
    data = json.dumps(json.loads(figure.to_json()), allow_nan=False).replace("<", "\\u003c")
    safe = data.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Markup(
        f'<div id="{div_id}" class="chart"></div><script nonce="{nonce}">'
        f"{{const f={safe};Plotly.newPlot('{div_id}',f.data,f.layout,{{responsive:true,displaylogo:false}})}}</script>"
    )


def _prompts(order: Sequence[Setting]) -> list[dict[str, Any]]:
    """Samples for each prompt and seed: of the base model, then of each run, best first."""
    runs = [run for setting in order for run in setting.runs if run.images]
    keys = list(dict.fromkeys((p.prompt, p.seed) for run in runs for p in run.images))
    labels = {run.folder: setting.label for setting in order for run in setting.runs}
    blocks = []
    for prompt, seed in keys:
        shown: list[tuple[str, str]] = []
        for run in runs:
            before, after = (
                [p.file for p in images if (p.prompt, p.seed) == (prompt, seed)]
                for images in (run.first_images(), run.last_images())
            )
            if not shown and before:
                shown.append(("before", _image(before[0], _SIDE)))
            if after:
                run_seed = f", seed {run.config.get('seed')}" if len(runs) > len(order) else ""
                shown.append((labels[run.folder] + run_seed, _image(after[0], _SIDE)))
        blocks.append({"prompt": prompt, "seed": seed, "shown": shown})
    return blocks


def _image(file: Path, side: int) -> str:
    """Data URI of the image in ``file``, scaled down to at most ``side`` pixels on its longer side."""
    with Image.open(file) as image:
        small = image.convert("RGB")
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, format="WEBP", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def standalone_overrides(overrides: Sequence[str]) -> list[str]:
    """``overrides`` of a sweep's job for a single run: without its Optuna trial and without pruning."""
    standalone = [override for override in overrides if not override.startswith("trial=")]
    if len(standalone) == len(overrides):
        return standalone
    return [*(o for o in standalone if not o.startswith("callbacks.pruning=")), "callbacks.pruning=null"]


def _config_dir_option(run: Run) -> list[str]:
    return [] if run.config_folder is None else ["-cd", run.config_folder]


def _run_row(run: Run, folder: Path, setting: Setting) -> dict[str, Any]:
    relative = run.folder.relative_to(folder) if run.folder.is_relative_to(folder) else run.folder
    return {
        "name": str(relative) if relative.parts else run.folder.resolve().name,
        "state": run.state,
        "error": run.error,
        "values": [_value(value) for value in setting.own.values()],
        "command": " ".join(
            map(shell_word, ["sdtune", "train", *_config_dir_option(run), *standalone_overrides(run.overrides)])
        ),
    }
