"""Plotly figures of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from sdtune.reporting.ranking import Setting
from sdtune.runs.metrics import LOWER_IS_BETTER

COLOURS = ("#1f5fa8", "#d9622b", "#2b8a57", "#8a4fb0", "#b8860b", "#c2385a", "#3a8fa3", "#6b6b6b")
_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"family": "system-ui, sans-serif", "size": 13},
    "margin": {"l": 70, "r": 20, "t": 50, "b": 60},
    "height": 420,
}
_MENU = {"x": 0, "xanchor": "left", "y": 1.18}
_NAME, _LINE = 0.3, 0.08
"""Width and height of a point's name, as shares of the chart."""

COSTS = {
    "seconds": "time of the steps, s",
    "trainable_parameters": "trained parameters",
    "artifact_bytes": "artifact, bytes",
    "peak_memory_bytes": "peak memory, bytes",
}


def heat_map(found: Sequence[Setting], metrics: Sequence[str], first: str) -> go.Figure | None:
    """Any of ``metrics`` over the two settings that vary most; None where fewer do, or most cells are empty."""
    keys = _axes(found)
    if keys is None:
        return None
    across, down = keys
    columns, rows = (sorted({s.own[key] for s in found}, key=_sortable) for key in keys)
    if 2 * len({(s.own[across], s.own[down]) for s in found}) < len(columns) * len(rows):
        return None  # a search, which asks for a new value each time
    ordered = [first, *(metric for metric in metrics if metric != first)]

    traces = [
        go.Heatmap(
            z=[[_best_mean(found, metric, {across: column, down: row}) for column in columns] for row in rows],
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
    buttons = [
        {"label": metric, "method": "update", "args": [{"visible": [m == metric for m in ordered]}]}
        for metric in ordered
    ]
    figure = go.Figure(traces, {**_LAYOUT, "xaxis": {"title": across, "type": "category"}})
    figure.update_layout(yaxis={"title": down, "type": "category"}, updatemenus=[{"buttons": buttons, **_MENU}])
    return figure


def _best_mean(found: Sequence[Setting], metric: str, values: Mapping[str, Any]) -> float | None:
    """The best mean of ``metric`` among the settings that have ``values``; None where there is none."""
    here = [s.metric(metric) for s in found if all(s.own[key] == value for key, value in values.items())]
    means = [figure.mean for figure in here if figure is not None]
    if not means:
        return None
    return min(means) if metric in LOWER_IS_BETTER else max(means)


def plane(found: Sequence[Setting], metric: str) -> go.Figure | None:
    """``metric`` as the colour of points over the two settings that vary most; None where fewer than two do.

    Plotly's parallel coordinates would show more, but need WebGL and code made at run time, which the page forbids.
    """
    keys = _axes(found)
    rows = [(setting, figure.mean) for setting in found if (figure := setting.metric(metric)) is not None]
    if keys is None or len(rows) < 2:
        return None
    places = [[setting.own[key] for setting, _ in rows] for key in keys]
    figure = go.Figure(
        go.Scatter(
            x=places[0],
            y=places[1],
            mode="markers",
            text=[setting.label for setting, _ in rows],
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
    for axis, key, values in zip((figure.layout.xaxis, figure.layout.yaxis), keys, places, strict=True):
        axis.title.text, axis.type, axis.exponentformat = key, _scale(values), "e"
        axis.categoryorder, axis.categoryarray = "array", sorted(set(values), key=_sortable)
    return figure


def _scale(values: Sequence[Any]) -> str:
    """Logarithmic where numbers span a decade, one step per value where they are few or words."""
    if len(set(values)) <= 5 or not all(isinstance(value, int | float) for value in values):
        return "category"
    return "log" if min(values) > 0 and max(values) / min(values) >= 10 else "linear"


def _sortable(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def _axes(found: Sequence[Setting]) -> tuple[str, str] | None:
    counts = {key: len({str(s.own[key]) for s in found}) for key in found[0].own}
    varied = [key for key, count in counts.items() if count > 1 and _plain(found, key)]
    preferred = [key for key in ("optimizer.lr", "method.rank") if key in varied]
    keys = [*preferred, *sorted((k for k in varied if k not in preferred), key=lambda k: -counts[k])]
    return (keys[0], keys[1]) if len(keys) > 1 else None


def _plain(found: Sequence[Setting], key: str) -> bool:
    return all(isinstance(s.own[key], int | float | str) for s in found)


def curves(found: Sequence[Setting], column: str, smooth: float) -> go.Figure | None:
    """``column`` of each run's history over its steps, smoothed exponentially; a setting has one colour."""
    figure = go.Figure(layout={**_LAYOUT, "xaxis": {"title": "step"}, "yaxis": {"title": column}})
    for number, setting in enumerate(found):
        for index, run in enumerate(setting.runs):
            points = [(row["step"], row[column]) for row in run.history if column in row]
            if not points:
                continue
            figure.add_scatter(
                x=[step for step, _ in points],
                y=_smoothed([value for _, value in points], smooth),
                mode="lines" if len(points) > 1 else "markers",
                name=setting.label,
                legendgroup=str(number),
                showlegend=index == 0,
                line={"color": COLOURS[number % len(COLOURS)], "dash": _dash(number)},
            )
    return figure if figure.data else None


def _dash(number: int) -> str:
    return ("solid", "dash", "dot")[number // len(COLOURS) % 3]


def _smoothed(values: Sequence[float], weight: float) -> list[float]:
    out: list[float] = []
    total = share = 0.0
    for value in values:
        total, share = weight * total + (1 - weight) * value, weight * share + (1 - weight)
        out.append(total / share)
    return out


def cost_and_effect(found: Sequence[Setting], metric: str) -> go.Figure | None:
    """``metric`` against each of :data:`COSTS`, with the front of settings that none beats in both."""
    points = {cost: _points(found, cost, metric) for cost in COSTS}
    shown = [cost for cost in COSTS if points[cost]]
    if not shown:
        return None
    traces = [trace for cost in shown for trace in _scatter_and_front(points[cost], metric, cost == shown[0])]
    buttons = [
        {
            "label": COSTS[cost],
            "method": "update",
            "args": [
                {"visible": [i // 2 == number for i in range(len(traces))]},
                {"xaxis.title.text": COSTS[cost]},
            ],
        }
        for number, cost in enumerate(shown)
    ]
    figure = go.Figure(traces, {**_LAYOUT, "xaxis": {"title": {"text": COSTS[shown[0]]}, "type": "log"}})
    figure.update_layout(yaxis={"title": metric}, updatemenus=[{"buttons": buttons, **_MENU}])
    return figure


Point = tuple[Setting, float, float]
"""A setting, its cost, and its metric."""


def _points(found: Sequence[Setting], cost: str, metric: str) -> list[Point]:
    costs = ((setting, _cost(setting, cost), setting.metric(metric)) for setting in found)
    return [(setting, x, figure.mean) for setting, x, figure in costs if x is not None and figure is not None]


def _scatter_and_front(points: Sequence[Point], metric: str, visible: bool) -> tuple[go.Scatter, go.Scatter]:
    scatter = go.Scatter(
        x=[x for _, x, _ in points],
        y=[y for _, _, y in points],
        text=[setting.label for setting, _, _ in points],
        mode="markers+text" if _roomy(points) else "markers",
        textposition="top center",
        cliponaxis=False,
        marker={"size": 11, "color": [COLOURS[i % len(COLOURS)] for i in range(len(points))]},
        hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
        visible=visible,
        showlegend=False,
    )
    front = pareto([(x, y) for _, x, y in points], lower=metric in LOWER_IS_BETTER)
    line = go.Scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        line={"color": "#999", "dash": "dot"},
        name="Pareto front",
        hoverinfo="skip",
        visible=visible,
    )
    return scatter, line


def _roomy(points: Sequence[Point]) -> bool:
    """Whether the points lie far enough apart for their names to be read; else they show under the pointer."""
    across, up = [math.log(x) for _, x, _ in points], [y for _, _, y in points]
    wide, high = (max(v) - min(v) or 1.0 for v in (across, up))
    places = list(zip(across, up, strict=True))
    return not any(
        abs(x - a) < _NAME * wide and abs(y - b) < _LINE * high
        for i, (x, y) in enumerate(places)
        for a, b in places[:i]
    )


def _cost(setting: Setting, cost: str) -> float | None:
    if cost != "seconds":
        figure = setting.metric(cost)
        return figure.mean if figure is not None and figure.mean > 0 else None
    step, steps = setting.metric("median_step_seconds"), setting.metric("steps")
    return step.mean * steps.mean if step is not None and steps is not None else None


def pareto(points: Sequence[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """The points that none other beats in cost (less) and effect (more, or less where ``lower``), by cost."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], p[1] if lower else -p[1])):
        if not front or (y < front[-1][1] if lower else y > front[-1][1]):
            front.append((x, y))
    return front
