"""Rank settings (groups of runs that differ only in the seed) by a metric, with a significance test."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import mpmath

from sdtune.reporting.collect import Run
from sdtune.runs.metrics import LOWER_IS_BETTER, SHARES, unit

PREFERRED = ("subject_gain", "style_accuracy", "control_agreement", "clip_image", "validation_loss")
_SEED = "seed"
_NOT_PART_OF_SETTING = (_SEED, "name", "trial", "resume")


@dataclass(frozen=True)
class MetricStatistics:
    """Statistics of a metric over the seeds of a setting.

    Attributes:
        spread: standard deviation; None for one seed.
        count: number of seeds.
        floor: minimum standard deviation of a share of n images (binomial); 0 for other metrics.
    """

    mean: float
    spread: float | None
    count: int
    floor: float = 0.0

    def near(self, other: MetricStatistics, comparisons: int) -> bool | None:
        """Whether the means do not differ significantly: Welch's t-test (1947) at 5% / ``comparisons`` (Bonferroni).

        None if one of them has a single seed, so that its noise is unknown.
        """
        if self.spread is None or other.spread is None:
            return None
        if self.mean == other.mean:
            return True
        # Seeds may agree by chance or at the end of the scale; the metric is still not exact.
        spread, other_spread = max(self.spread, self.floor), max(other.spread, other.floor)
        if spread == other_spread == 0:
            return False
        variance, other_variance = spread**2 / self.count, other_spread**2 / other.count
        total = variance + other_variance
        # Welch-Satterthwaite: effective degrees of freedom of the summed variances.
        degrees = total**2 / (variance**2 / (self.count - 1) + other_variance**2 / (other.count - 1))
        return two_sided_p((self.mean - other.mean) / math.sqrt(total), degrees) > 0.05 / comparisons


def two_sided_p(t: float, degrees: float) -> float:
    """Probability of a value of at least ``|t|`` in Student's t distribution with ``degrees`` degrees of freedom.

    It is I_x(degrees / 2, 1 / 2) with x = degrees / (degrees + t^2) (Abramowitz & Stegun 26.7.1). Not by scipy:
    where scipy is installed, torchmetrics imports ``scipy.signal``, which makes each command half a second slower.
    """
    return float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in the seed.

    Attributes:
        own: config keys and values that distinguish it from the other settings: of the command lines, or of the config.
    """

    own: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """Distinguishing keys and values; the run folder's name if there are none."""
        return self._label({key: key for key in self.own})

    @property
    def short_label(self) -> str:
        """:attr:`label` with the last part of each key, such as ``rank 8``, unless two keys end in the same part."""
        return self._label(short_names(list(self.own)))

    def _label(self, names: Mapping[str, str]) -> str:
        values = {key: value for key, value in self.own.items() if value is not None}
        if list(values) == ["experiment"]:
            return str(values["experiment"])
        return ", ".join(f"{names[key]} {_short(value)}" for key, value in values.items()) or self.runs[0].folder.name

    def best_run(self, metric: str) -> Run:
        """The run with the best ``metric``, among those that have it."""
        measured = [run for run in self.runs if metric in run.metrics]
        return (min if metric in LOWER_IS_BETTER else max)(measured, key=lambda run: run.metrics[metric])

    def metric(self, metric: str) -> MetricStatistics | None:
        """Statistics of ``metric`` over the runs that have it; None if none has."""
        # Count a repeated seed once.
        by_seed = {str(run.config.get(_SEED)): run.metrics[metric] for run in self.runs if metric in run.metrics}
        values = list(by_seed.values())
        if not values:
            return None
        mean, images = fmean(values), self.runs[0].config.get("evaluation.images")
        floor = 0.0
        if metric in SHARES and isinstance(images, int):
            # Standard deviation of a binomial share, by Laplace's rule: not zero if all or none are right.
            share = (min(max(mean, 0.0), 1.0) * images + 1) / (images + 2)
            floor = (share * (1 - share) / images) ** 0.5
        return MetricStatistics(mean, stdev(values) if len(values) > 1 else None, len(values), floor)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, such as ``rank``; the full key if two end in the same part."""
    counts = Counter(key.rpartition(".")[2] for key in keys)
    return {key: last if counts[last := key.rpartition(".")[2]] == 1 else key for key in keys}


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def varied(runs: Sequence[Run]) -> list[str]:
    """Config keys in which ``runs`` differ, except seed and name, in the order of the config."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    values = {key: {json.dumps(run.config.get(key), sort_keys=True, default=str) for run in runs} for key in keys}
    return [key for key in keys if len(values[key]) > 1 and key not in _NOT_PART_OF_SETTING]


def group_by_setting(runs: Sequence[Run]) -> list[Setting]:
    """Group ``runs`` that differ only in the seed."""
    keys = varied(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.config.get(key) for key in keys], default=str), []).append(run)
    # Prefer the command line: a recipe's name is clearer than the many keys that it sets.
    typed = _distinct_overrides([group[0] for group in groups.values()])
    distinguishing = typed or [{key: group[0].config.get(key) for key in keys} for group in groups.values()]
    return [Setting(own, tuple(group)) for own, group in zip(distinguishing, groups.values(), strict=True)]


def _distinct_overrides(runs: Sequence[Run]) -> list[dict[str, Any]] | None:
    """Overrides in which the command lines differ; None if they do not distinguish all ``runs``."""
    lines = [dict(o.lstrip("+~").partition("=")[::2] for o in run.overrides) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for line in lines for key in line)
        if key not in _NOT_PART_OF_SETTING
        and not key.startswith("hydra.")
        and len({line.get(key) for line in lines}) > 1
    ]
    values = [{key: run.config.get(key, line.get(key)) for key in keys} for run, line in zip(runs, lines, strict=True)]
    distinct = len({json.dumps(value, default=str) for value in values}) == len(runs)
    return values if keys and distinct else None


def metrics(runs: Sequence[Run]) -> list[str]:
    """Names of all metrics of ``runs``, in the order of their files."""
    return list(dict.fromkeys(key for run in runs for key in run.metrics))


def chosen(runs: Sequence[Run]) -> str | None:
    """Metric to rank by: ``optimized_metric``, else the first available of a list of preferred metrics."""
    known = metrics(runs)
    optimized = [run.config.get("optimized_metric") for run in runs]
    return next((key for key in (*optimized, *PREFERRED) if key in known), None)


Place = tuple[Setting, "MetricStatistics", "bool | None"]
"""A setting, its metric, and whether the metric is within the noise of the best one; None if unknown."""


def rankings(settings: Sequence[Setting]) -> list[tuple[str, list[Place]]]:
    """Rankings of all settings: by the metric of :func:`chosen`, then those without it by their metric, and so on."""
    out: list[tuple[str, list[Place]]] = []
    remaining = list(settings)
    while (metric := chosen([run for setting in remaining for run in setting.runs])) is not None:
        out.append((metric, ranked(remaining, metric)))
        remaining = [setting for setting in remaining if setting.metric(metric) is None]
    return out


def ranked(settings: Sequence[Setting], metric: str) -> list[Place]:
    """Rank the settings that have ``metric``, best first."""
    rows = [(setting, statistics) for setting in settings if (statistics := setting.metric(metric)) is not None]
    rows.sort(key=lambda row: row[1].mean, reverse=metric not in LOWER_IS_BETTER)
    return [(s, value, i > 0 and value.near(rows[0][1], len(rows) - 1)) for i, (s, value) in enumerate(rows)]


_MOST_LINES = 10


def ranking_lines(runs: Sequence[Run]) -> list[str]:
    """Lines with the settings of ``runs``, best first by their metric; the last line names the best one and its run.

    Empty for a single setting, and if the runs have no metric to rank by.
    """
    tables = rankings(group_by_setting(runs))
    if not tables or len(tables[0][1]) < 2:
        return []
    metric, places = tables[0]
    lines = [f"ranking by {metric}:"]
    for number, (setting, statistics, near) in enumerate(places[:_MOST_LINES], start=1):
        spread = f" ± {unit(statistics.spread, metric)}" if statistics.spread is not None else ""
        noise = "  (within the noise of the first)" if near else ""
        lines.append(f"{number:>4}  {unit(statistics.mean, metric)}{spread}  {setting.label}{noise}")
    hidden = len(places) - _MOST_LINES
    return [*lines, *([f"      and {hidden} more"] if hidden > 0 else []), _winner(metric, places)]


def _winner(metric: str, places: Sequence[Place]) -> str:
    """Line with the best setting, and how many are within its noise."""
    best, statistics, _ = places[0]
    spread = f" ± {unit(statistics.spread, metric)}" if statistics.spread is not None else ""
    near = sum(is_near is True for *_, is_near in places)
    unclear = f"; within its noise: {near} of the other {len(places) - 1}" if near else ""
    if statistics.spread is None:
        unclear = "; its noise is unknown (one seed)"
    return (
        f"best of {len(places)} settings by {metric}: {best.label} ({unit(statistics.mean, metric)}{spread}){unclear}:"
        f" {best.best_run(metric).folder}"
    )
