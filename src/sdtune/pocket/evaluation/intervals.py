"""Confidence intervals of the world's metrics, over seeds and images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdtune import streams
from sdtune.randomness import generator

DRAWS = 2_000
"""Of the bootstrap."""

_OF_PAIRS = ("class_distance", "diversity")
"""Metrics whose reading of an image is a mean over its pairs with the others."""

Readings = Mapping[str, np.ndarray]
"""By metric, float64 [seeds, images]."""

Interval = tuple[float, float, float]
"""Mean, and the interval's low and high end."""


def gain(means: Mapping[str, Any], ceiling: float) -> Any:
    """``subject_gain`` from ``subject_accuracy`` and its base."""
    return (means["subject_accuracy"] - means["base_subject_accuracy"]) / (ceiling - means["base_subject_accuracy"])


def intervals(readings: Readings, ceiling: float | None) -> dict[str, Interval]:
    """Mean and 95% interval of each metric (percentile bootstrap, Efron & Tibshirani 1993, chapter 13).

    Seeds are drawn with replacement, then images within each; the base's images with those of the trained model,
    since their prompts and seeds are the same. With three seeds it covers less than 95% where these differ more than
    the images. A mean over pairs of images has twice the error that its images' own means show (a U-statistic of
    degree 2, Hoeffding 1948), so their deviations count twice.
    """
    own = dict(readings)
    if "control_agreement" in own:
        own["control_less_shuffled"] = own["control_agreement"] - own["control_agreement_shuffled"]
    seeds = len(next(iter(own.values())))
    rng = generator(0, streams.BOOTSTRAP)
    drawn: dict[str, list[float]] = {key: [] for key in own}
    for _ in range(DRAWS):
        rows = rng.integers(seeds, size=(seeds, 1))
        columns = {n: rng.integers(n, size=(seeds, n)) for n in sorted({v.shape[1] for v in own.values()})}
        for key, values in own.items():
            value, whole = float(values[rows, columns[values.shape[1]]].mean()), float(values[rows[:, 0]].mean())
            drawn[key].append(2 * value - whole if key.removeprefix("base_") in _OF_PAIRS else value)
    centre = {key: float(values.mean()) for key, values in own.items()}
    spread = {key: np.array(values) for key, values in drawn.items()}
    if ceiling is not None and {"subject_accuracy", "base_subject_accuracy"} <= own.keys():
        centre["subject_gain"], spread["subject_gain"] = gain(centre, ceiling), gain(spread, ceiling)
    if "class_distance" in own:
        centre["class_diversity"] = centre["class_distance"] / centre["base_class_distance"]
        spread["class_diversity"] = spread["class_distance"] / spread["base_class_distance"]
    return {
        key: (centre[key], float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975)))
        for key, values in spread.items()
    }
