"""Tables of a report: the ranking of settings, the runs, and the config keys in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtune.quoting import shell_word
from sdtune.reporting.collect import Run
from sdtune.reporting.facts import shown
from sdtune.reporting.ranking import PREFERRED, MetricStatistics, Place, Setting, metrics, short_names
from sdtune.runs.metrics import DESCRIPTIONS, HIGHER_IS_BETTER, LOWER_IS_BETTER, OF_TRAINING, unit

_VISIBLE = 5
"""Number of further metrics that a ranking shows at first."""
_MOST_KEYS = 4
"""Varied settings that have columns of their own; more are one column with all of them."""
_MOST_RUN_KEYS = 7
_NOT_RANKED = ("base_", "ceiling_")
_COSTS_SHOWN = ("median_step_seconds", "peak_memory_bytes")


def ranking_table(metric: str, places: Sequence[Place], *, with_base: bool = True) -> dict[str, Any]:
    """Data of the ranking table by ``metric``, best setting first.

    Args:
        with_base: whether the base model, if it is the same for all, is an additional row.
    """
    runs = [run for setting, *_ in places for run in setting.runs]
    others = [m for m in metrics(runs) if m != metric and not m.startswith(_NOT_RANKED)]
    # Omit metrics that are equal for all settings.
    others = [m for m in others if len(places) == 1 or len({run.metrics.get(m) for run in runs}) > 1]
    others.sort(key=lambda m: (m in OF_TRAINING, PREFERRED.index(m) if m in PREFERRED else len(PREFERRED)))
    visible = {*[m for m in others if m not in OF_TRAINING][: _VISIBLE - len(_COSTS_SHOWN)], *_COSTS_SHOWN}
    keys = list(places[0][0].own)
    split = len(keys) <= _MOST_KEYS
    names = short_names(keys)
    rows = [
        {
            "place": i + 1,
            "setting": [_text(setting.own[key]) for key in keys] if split and keys else [setting.short_label],
            "value": shown(statistics, metric),
            "number": statistics.mean,
            "noise": _noise(setting, statistics, noise, best=i == 0),
            "cells": [_cell(setting.metric(column), column) for column in others],
        }
        for i, (setting, statistics, noise) in enumerate(places)
    ]
    return {
        "metric": column(metric),
        "keys": [(names[key], key) for key in keys] if split and keys else [("setting", "")],
        "columns": [{**column(key), "visible": key in visible} for key in others],
        "rows": rows,
        "base": _base_row(runs, metric, others) if with_base else None,
    }


def column(metric: str) -> dict[str, Any]:
    """Name, explanation and direction of ``metric``."""
    direction = "lower" if metric in LOWER_IS_BETTER - {"steps"} else "higher" if metric in HIGHER_IS_BETTER else ""
    return {"name": metric, "text": DESCRIPTIONS.get(metric, ""), "direction": direction}


def _base_row(runs: Sequence[Run], metric: str, others: Sequence[str]) -> list[dict[str, Any]] | None:
    """Cells of the base model, whose metrics each run measures; None if no run has them."""
    cells = []
    for key in (metric, *others):
        values = [run.metrics[f"base_{key}"] for run in runs if f"base_{key}" in run.metrics]
        mean = sum(values) / len(values) if values else None
        cells.append({"text": "" if mean is None else unit(mean, key), "number": mean})
    return cells if any(cell["number"] is not None for cell in cells) else None


def _cell(value: MetricStatistics | None, metric: str) -> dict[str, Any]:
    return {"text": shown(value, metric), "number": None if value is None else value.mean}


def _noise(setting: Setting, statistics: MetricStatistics, within: bool | None, best: bool) -> str:
    """Number of seeds, and whether the difference to the best setting is within the noise."""
    seeds = len({str(run.config.get("seed")) for run in setting.runs})
    counted = (
        f"{statistics.count} of {seeds} seeds" if statistics.count < seeds else f"{seeds} seeds" if seeds > 1 else ""
    )
    if best or within is False:
        return counted
    comparison = "within the noise" if within else "noise unknown (one seed)"
    return f"{counted}, {comparison}" if counted else comparison


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(settings: Sequence[Setting], keys: Sequence[str]) -> dict[str, Any]:
    """Table of the config ``keys`` in which the settings differ, such as those that a recipe sets."""
    values = [[_text(setting.runs[0].config.get(key)) for setting in settings] for key in keys]
    return {"labels": [s.short_label for s in settings], "rows": list(zip(keys, values, strict=True))}


def runs_table(settings: Sequence[Setting], folder: Path, metric: str | None) -> dict[str, Any]:
    """Data of the table of all runs."""
    names = short_names(list(settings[0].own))
    split = len(names) <= _MOST_RUN_KEYS
    rows = [_run_row(run, folder, setting, metric, split) for setting in settings for run in setting.runs]
    keys = [(names[key], key) for key in settings[0].own] if split else [("setting", "")]
    return {"keys": keys, "metric": metric, "rows": rows}


def _run_row(run: Run, folder: Path, setting: Setting, metric: str | None, split: bool) -> dict[str, Any]:
    value = run.metrics.get(metric) if metric is not None else None
    last = max((steps[-1] for steps, _ in run.curves.values() if steps), default=0)
    return {
        "name": run_name(run, folder),
        "state": run.state,
        "error": run.error,
        "values": [_text(value) for value in setting.own.values()] if split else [setting.short_label],
        "seed": _text(run.config.get("seed")),
        "steps": f"{last} of {run.config.get('trainer.max_steps', '?')}" if last else "",
        "last_step": last,
        "value": "" if value is None or metric is None else unit(value, metric),
        "number": value,
        "folder": run.folder,
        "command": repeating_command(run),
    }


def run_name(run: Run, folder: Path) -> str:
    """Path of ``run`` below the folder of the report."""
    relative = run.folder.relative_to(folder) if run.folder.is_relative_to(folder) else run.folder
    return str(relative) if relative.parts else run.folder.resolve().name


def repeating_command(run: Run) -> str:
    """Shell command that repeats ``run``."""
    config_dir = [] if run.config_folder is None else ["-cd", run.config_folder]
    return " ".join(map(shell_word, ["sdtune", "train", *config_dir, *standalone_overrides(run.overrides)]))


def standalone_overrides(overrides: Sequence[str]) -> list[str]:
    """``overrides`` of a sweep's job for a single run: without its Optuna trial and without pruning."""
    standalone = [override for override in overrides if not override.startswith("trial=")]
    if len(standalone) == len(overrides):
        return standalone
    return [*(o for o in standalone if not o.startswith("callbacks.pruning=")), "callbacks.pruning=null"]


def reasons(runs: Sequence[Run]) -> Mapping[str, str]:
    """Metric -> why it could not be measured."""
    return {key: reason for run in runs for key, reason in run.reasons.items()}


def settings_of(run: Run) -> list[tuple[str, str]]:
    """All settings of ``run``, by dotted key."""
    shown = [(key, value) for key, value in run.config.items() if not key.rpartition(".")[2].startswith("_")]
    return [(key, "null" if value is None else _text(value)) for key, value in shown]
