"""Rank settings: runs that differ only in their seed are one setting; ties within the noise are named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from sdtune.reporting.collect import Run
from sdtune.runs.metrics import LOWER_IS_BETTER, SHARES

_PREFERRED = ("subject_gain", "style_accuracy", "control_agreement", "clip_image", "validation_loss")
_SEED = "seed"
_OF_A_RUN_ALONE = (_SEED, "name", "trial", "resume")


@dataclass(frozen=True)
class MetricStatistics:
    """A metric over a setting's seeds; ``spread`` is the standard deviation, None for one seed.

    ``floor``: the standard deviation that a share of so many images has anyway, 0 for other metrics.
    """

    mean: float
    spread: float | None
    count: int
    floor: float = 0.0

    def near(self, other: MetricStatistics, comparisons: int) -> bool | None:
        """Whether the two means may well be one: Welch's t-test (1947) at 5%, shared out over ``comparisons``.

        None where one of them has a single seed, whose noise nobody knows.
        """
        if self.spread is None or other.spread is None:
            return None
        if self.mean == other.mean:
            return True
        # Seeds that agree by chance, or at the end of a scale, do not make a metric exact.
        mine, theirs = max(self.spread, self.floor), max(other.spread, other.floor)
        if mine == theirs == 0:
            return False
        from scipy.stats import ttest_ind_from_stats  # a second of imports

        test = ttest_ind_from_stats(self.mean, mine, self.count, other.mean, theirs, other.count, equal_var=False)
        return bool(test.pvalue > 0.05 / comparisons)


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone; ``own`` is what sets them apart: of their command lines, or of all."""

    own: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """Its own settings, or the run's folder where there are none."""
        own = {key: value for key, value in self.own.items() if value is not None}
        if list(own) == ["experiment"]:
            return str(own["experiment"])
        return ", ".join(f"{key} {_short(value)}" for key, value in own.items()) or self.runs[0].folder.name

    def metric(self, metric: str) -> MetricStatistics | None:
        """``metric`` over the runs that have it."""
        # A seed that was run twice is one replicate.
        by_seed = {str(run.config.get(_SEED)): run.metrics[metric] for run in self.runs if metric in run.metrics}
        values = list(by_seed.values())
        if not values:
            return None
        mean, images = fmean(values), self.runs[0].config.get("evaluation.images")
        floor = 0.0
        if metric in SHARES and isinstance(images, int):
            # A binomial share's deviation, by Laplace's rule: not nothing where all or none are right.
            share = (min(max(mean, 0.0), 1.0) * images + 1) / (images + 2)
            floor = (share * (1 - share) / images) ** 0.5
        return MetricStatistics(mean, stdev(values) if len(values) > 1 else None, len(values), floor)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def varied(runs: Sequence[Run]) -> list[str]:
    """The settings in which ``runs`` differ, seeds and names apart, in the config's order."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    values = {key: {json.dumps(run.config.get(key), sort_keys=True, default=str) for run in runs} for key in keys}
    return [key for key in keys if len(values[key]) > 1 and key not in _OF_A_RUN_ALONE]


def group_by_setting(runs: Sequence[Run]) -> list[Setting]:
    """``runs``, those together that differ in their seed alone."""
    keys = varied(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.config.get(key) for key in keys], default=str), []).append(run)
    # A recipe's name says more than the fifty settings that it changes.
    typed = _typed([group[0] for group in groups.values()])
    own = typed or [{key: group[0].config.get(key) for key in keys} for group in groups.values()]
    return [Setting(mine, tuple(group)) for mine, group in zip(own, groups.values(), strict=True)]


def _typed(runs: Sequence[Run]) -> list[dict[str, Any]] | None:
    """What each command line has that others have not; None where that does not tell ``runs`` apart."""
    lines = [dict(o.lstrip("+~").partition("=")[::2] for o in run.overrides) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for line in lines for key in line)
        if key not in _OF_A_RUN_ALONE and not key.startswith("hydra.") and len({line.get(key) for line in lines}) > 1
    ]
    found = [{key: run.config.get(key, line.get(key)) for key in keys} for run, line in zip(runs, lines, strict=True)]
    apart = len({json.dumps(mine, default=str) for mine in found}) == len(runs)
    return found if keys and apart else None


def metrics(runs: Sequence[Run]) -> list[str]:
    """All that was measured, in the order in which runs have it."""
    return list(dict.fromkeys(key for run in runs for key in run.metrics))


def chosen(runs: Sequence[Run]) -> str | None:
    """The metric to rank by: the one that was optimised, or the first that says most."""
    known = metrics(runs)
    wanted = [run.config.get("optimized_metric") for run in runs]
    return next((key for key in (*wanted, *_PREFERRED) if key in known), None)


Place = tuple[Setting, "MetricStatistics", "bool | None"]
"""A setting, its metric, and whether that lies within the noise of the best; None where nobody knows."""


def rankings(found: Sequence[Setting]) -> list[tuple[str, list[Place]]]:
    """A ranking by the metric that :func:`chosen` names; the settings that lack it by their own, and so on."""
    out: list[tuple[str, list[Place]]] = []
    left = list(found)
    while (metric := chosen([run for setting in left for run in setting.runs])) is not None:
        out.append((metric, ranked(left, metric)))
        left = [setting for setting in left if setting.metric(metric) is None]
    return out


def ranked(found: Sequence[Setting], metric: str) -> list[Place]:
    """The settings that have ``metric``, best first."""
    rows = [(setting, figure) for setting in found if (figure := setting.metric(metric)) is not None]
    rows.sort(key=lambda row: row[1].mean, reverse=metric not in LOWER_IS_BETTER)
    return [(s, figure, i > 0 and figure.near(rows[0][1], len(rows) - 1)) for i, (s, figure) in enumerate(rows)]
