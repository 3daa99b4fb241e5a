"""Plotly charts of the HTML report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from sdtune.errors import UserError
from sdtune.reporting.ranking import Setting
from sdtune.runs.metrics import LOWER_IS_BETTER, Curve

COLORS = ("#1f77d0", "#d9622b", "#2b9a5f", "#9a5fc0", "#b8860b", "#d0486a", "#3a9fb3", "#8b8b8b")
"""Colors of settings, distinguishable on a white and on a dark page."""
_MOST_CURVES = 60
"""Number of runs whose curves a page shows."""
_MOST_POINTS = 100_000
"""Number of points of all curves of a page."""
_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"family": "system-ui, sans-serif", "size": 13},
    "margin": {"l": 70, "r": 20, "t": 50, "b": 60},
    "height": 420,
}
_LABEL_WIDTH, _LABEL_HEIGHT = 0.3, 0.08
"""Width and height of a point's label, as fractions of the chart."""

COSTS = {
    "seconds": "time of all steps, s",
    "trainable_parameters": "trainable parameters",
    "artifact_bytes": "artifact size, bytes",
    "peak_memory_bytes": "peak memory, bytes",
}


@dataclass(frozen=True)
class Chart:
    """Plotly figure with title and note.

    Attributes:
        summary: what the chart shows, for screen readers.
        choices: label of each variant and the arguments of ``Plotly.update`` that show it; the first is shown at first.
    """

    title: str
    note: str
    summary: str
    figure: go.Figure
    choices: tuple[tuple[str, list[Any]], ...] = ()


def heat_map(settings: Sequence[Setting], metrics: Sequence[str], first: str) -> Chart | None:
    """Heat map of each of ``metrics`` over the two most varied config keys, starting with the metric ``first``.

    None if fewer than two keys vary or more than half of the cells are empty.
    """
    keys = _axes(settings)
    if keys is None:
        return None
    across, down = keys
    columns, rows = (sorted({s.own[key] for s in settings}, key=_sortable) for key in keys)
    if 2 * len({(s.own[across], s.own[down]) for s in settings}) < len(columns) * len(rows):
        return None  # a random search, where nearly every value is unique
    ordered = [first, *(metric for metric in metrics if metric != first)]

    traces = [
        go.Heatmap(
            z=[[_best_mean(settings, metric, {across: column, down: row}) for column in columns] for row in rows],
            x=[str(c) for c in columns],
            y=[str(r) for r in rows],
            colorscale="Blues",
            reversescale=metric in LOWER_IS_BETTER,
            texttemplate="%{z:.4g}",
            visible=metric == first,
            hovertemplate=f"{across} %{{x}}, {down} %{{y}}: %{{z:.6g}}<extra></extra>",
        )
        for metric in ordered
    ]
    choices = tuple((metric, [{"visible": [m == metric for m in ordered]}, {}]) for metric in ordered)
    figure = go.Figure(traces, {**_LAYOUT, "xaxis": {"title": {"text": across}, "type": "category"}})
    figure.update_layout(yaxis={"title": {"text": down}, "type": "category"})
    note = "Darker is better. A cell with several settings shows the best one."
    return Chart("Heat map", note, f"Heat map of {first} over {across} and {down}", figure, choices)


def _best_mean(settings: Sequence[Setting], metric: str, values: Mapping[str, Any]) -> float | None:
    """Best mean of ``metric`` over the settings with ``values``; None if none has the metric."""
    statistics = [s.metric(metric) for s in settings if all(s.own[key] == value for key, value in values.items())]
    means = [s.mean for s in statistics if s is not None]
    if not means:
        return None
    return min(means) if metric in LOWER_IS_BETTER else max(means)


def scatter_plot(settings: Sequence[Setting], metric: str) -> Chart | None:
    """Scatter plot over the two most varied config keys, colored by ``metric``; None for fewer than two keys or points.

    Plotly's parallel coordinates would show more keys, but they need WebGL and code generated at run time, which the
    page's content security policy forbids.
    """
    keys = _axes(settings)
    rows = [(setting, value.mean) for setting in settings if (value := setting.metric(metric)) is not None]
    if keys is None or len(rows) < 2:
        return None
    columns = [[setting.own[key] for setting, _ in rows] for key in keys]
    figure = go.Figure(
        go.Scatter(
            x=columns[0],
            y=columns[1],
            mode="markers",
            text=[setting.short_label for setting, _ in rows],
            marker={
                "size": 14,
                "color": [value for _, value in rows],
                "colorscale": "Blues",
                "reversescale": metric in LOWER_IS_BETTER,
                "colorbar": {"title": {"text": metric}},
                "line": {"width": 1, "color": "#8893a5"},
            },
            hovertemplate="%{text}: %{marker.color:.6g}<extra></extra>",
        ),
        {**_LAYOUT},
    )
    for axis, key, values in zip((figure.layout.xaxis, figure.layout.yaxis), keys, columns, strict=True):
        axis.title.text, axis.type, axis.exponentformat = key, _scale(values), "e"
        axis.categoryorder, axis.categoryarray = "array", sorted(set(values), key=_sortable)
    summary = f"Scatter plot of {metric} over {keys[0]} and {keys[1]}"
    return Chart("Metric over the varied settings", "One point for each setting. Darker is better.", summary, figure)


def _scale(values: Sequence[Any]) -> str:
    """Plotly axis type: ``log`` for numbers over a decade or more, ``category`` for strings and up to five values."""
    if len(set(values)) <= 5 or not all(isinstance(value, int | float) for value in values):
        return "category"
    return "log" if min(values) > 0 and max(values) / min(values) >= 10 else "linear"


def _sortable(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def _axes(settings: Sequence[Setting]) -> tuple[str, str] | None:
    counts = {key: len({str(s.own[key]) for s in settings}) for key in settings[0].own}
    varied = [key for key, count in counts.items() if count > 1 and _plain(settings, key)]
    preferred = [key for key in ("optimizer.lr", "method.rank") if key in varied]
    keys = [*preferred, *sorted((k for k in varied if k not in preferred), key=lambda k: -counts[k])]
    return (keys[0], keys[1]) if len(keys) > 1 else None


def _plain(settings: Sequence[Setting], key: str) -> bool:
    return all(isinstance(s.own[key], int | float | str) for s in settings)


def curves(
    order: Sequence[Setting], numbers: Mapping[Path, int]
) -> dict[str, list[tuple[int, list[int], list[float | None]]]]:
    """Columns of ``metrics.csv``: run, steps and values of each curve, thinned; the runs of the best settings.

    Args:
        order: settings, best first.
        numbers: number of each run in the page, by its folder.
    """
    runs = [run for setting in order for run in setting.runs][:_MOST_CURVES]
    names = list(dict.fromkeys(name for run in runs for name, (steps, _) in run.curves.items() if steps))
    names.sort(key=lambda name: name not in ("loss", "validation_loss"))
    most = max(_MOST_POINTS // max(len(runs) * len(names), 1), 50)
    return {
        name: [
            (numbers[run.folder], *thinned(*run.curves[name], most))
            for run in runs
            if name in run.curves and run.curves[name][0]
        ]
        for name in names
    }


def single_curve(columns: Mapping[str, Curve], column: str, smoothing: float) -> go.Figure:
    """Line chart of ``column`` of one run, as an exponential mean with the weight ``smoothing`` of previous values.

    Raises:
        UserError: there is no such column.
    """
    if column not in columns or not columns[column][0]:
        known = [name for name, (steps, _) in columns.items() if steps]
        raise UserError(f"metrics.csv has no {column}", key="column", remedy=f"use one of {', '.join(known)}")
    steps, values = columns[column]
    smoothed: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = smoothing * total + (1 - smoothing) * value, smoothing * weight + (1 - smoothing)
        smoothed.append(total / weight)
    layout = {**_LAYOUT, "xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": column}}}
    return go.Figure(go.Scatter(x=steps, y=smoothed, mode="lines" if len(steps) > 1 else "markers"), layout)


def thinned(steps: Sequence[int], values: Sequence[float], most: int) -> tuple[list[int], list[float | None]]:
    """At most ``most`` points: the mean of each part of the curve, at its last step; five significant digits.

    NaN and infinity, which JSON lacks, become None.
    """
    size = max(-(-len(steps) // most), 1)
    parts = [slice(first, first + size) for first in range(0, len(steps), size)]
    means = [fmean(values[part]) for part in parts]
    shown = [float(f"{value:.5g}") if math.isfinite(value) else None for value in means]
    return [steps[part][-1] for part in parts], shown


def cost_and_effect(settings: Sequence[Setting], metric: str) -> Chart | None:
    """Scatter plots of ``metric`` against the :data:`COSTS` that differ by more than their noise, with Pareto front."""
    points = {cost: _points(settings, cost, metric) for cost in COSTS}
    shown = [cost for cost in COSTS if points[cost] and _differs([setting for setting, *_ in points[cost]], cost)]
    if not shown:
        return None
    traces = [trace for cost in shown for trace in _scatter_and_front(points[cost], metric, cost == shown[0])]
    choices = tuple(
        (
            COSTS[cost],
            [{"visible": [i // 2 == number for i in range(len(traces))]}, {"xaxis.title.text": COSTS[cost]}],
        )
        for number, cost in enumerate(shown)
    )
    figure = go.Figure(traces, {**_LAYOUT, "xaxis": {"title": {"text": COSTS[shown[0]]}, "type": "log"}})
    figure.update_layout(yaxis={"title": {"text": metric}})
    note = "Dotted line: Pareto front, the settings that no other beats in both. Costs within their noise are left out."
    return Chart("Metric against cost", note, f"Scatter plot of {metric} against {COSTS[shown[0]]}", figure, choices)


def _differs(settings: Sequence[Setting], cost: str) -> bool:
    """Whether the largest and the smallest cost differ by more than their spreads over seeds, and by 2% at least."""
    values = [(setting, _cost(setting, cost)) for setting in settings]
    known = sorted(((value, setting) for setting, value in values if value is not None), key=lambda pair: pair[0])
    if len(known) < 2:
        return False
    (low, first), (high, last) = known[0], known[-1]
    return high - low > max(0.02 * low, 2 * (_cost_spread(first, cost) + _cost_spread(last, cost)))


def _cost_spread(setting: Setting, cost: str) -> float:
    if cost != "seconds":
        value = setting.metric(cost)
        return 0.0 if value is None or value.spread is None else value.spread
    step, steps = setting.metric("median_step_seconds"), setting.metric("steps")
    return 0.0 if step is None or steps is None or step.spread is None else step.spread * steps.mean


Point = tuple[Setting, float, float]
"""A setting, its cost, and its metric."""


def _points(settings: Sequence[Setting], cost: str, metric: str) -> list[Point]:
    costs = ((setting, _cost(setting, cost), setting.metric(metric)) for setting in settings)
    return [(setting, x, value.mean) for setting, x, value in costs if x is not None and value is not None]


def _scatter_and_front(points: Sequence[Point], metric: str, visible: bool) -> tuple[go.Scatter, go.Scatter]:
    scatter = go.Scatter(
        x=[x for _, x, _ in points],
        y=[y for _, _, y in points],
        text=[setting.short_label for setting, _, _ in points],
        mode="markers+text" if _labels_fit(points) else "markers",
        textposition="top center",
        cliponaxis=False,
        marker={"size": 11, "color": [COLORS[i % len(COLORS)] for i in range(len(points))]},
        hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
        visible=visible,
        showlegend=False,
    )
    front = pareto_front([(x, y) for _, x, y in points], lower=metric in LOWER_IS_BETTER)
    line = go.Scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        line={"color": "#999", "dash": "dot"},
        name="Pareto front",
        showlegend=False,
        hoverinfo="skip",
        visible=visible,
    )
    return scatter, line


def _labels_fit(points: Sequence[Point]) -> bool:
    """Whether the labels of all points fit without overlap; otherwise they are shown on hover only."""
    log_costs, effects = [math.log(x) for _, x, _ in points], [y for _, _, y in points]
    width, height = (max(v) - min(v) or 1.0 for v in (log_costs, effects))
    positions = list(zip(log_costs, effects, strict=True))
    return not any(
        abs(x - a) < _LABEL_WIDTH * width and abs(y - b) < _LABEL_HEIGHT * height
        for i, (x, y) in enumerate(positions)
        for a, b in positions[:i]
    )


def _cost(setting: Setting, cost: str) -> float | None:
    if cost != "seconds":
        value = setting.metric(cost)
        return value.mean if value is not None and value.mean > 0 else None
    step, steps = setting.metric("median_step_seconds"), setting.metric("steps")
    return step.mean * steps.mean if step is not None and steps is not None else None


def pareto_front(points: Sequence[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """Pareto front of (cost, effect) points, sorted by cost; the effect is better if higher, or if ``lower``, lower."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], p[1] if lower else -p[1])):
        if not front or (y < front[-1][1] if lower else y > front[-1][1]):
            front.append((x, y))
    return front
