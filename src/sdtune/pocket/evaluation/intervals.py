"""Confidence intervals of pocket's metrics, over seeds and images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdtune import streams
from sdtune.randomness import generator

RESAMPLES = 2_000
"""Number of bootstrap resamples."""

_PAIR_METRICS = ("class_distance", "diversity")
"""Metrics whose value for an image is a mean over its pairs with the other images."""

Predictions = Mapping[str, np.ndarray]
"""Per-image values of each metric, float64 [seeds, images]."""

Interval = tuple[float, float, float]
"""Mean, lower bound and upper bound."""


def gain(means: Mapping[str, Any], ceiling: float) -> Any:
    """``subject_gain`` from ``subject_accuracy``, that of the base, and the ceiling."""
    return (means["subject_accuracy"] - means["base_subject_accuracy"]) / (ceiling - means["base_subject_accuracy"])


def intervals(readings: Predictions, ceiling: float | None) -> dict[str, Interval]:
    """Mean and 95% confidence interval of each metric (percentile bootstrap, Efron & Tibshirani 1993, chapter 13).

    Seeds are resampled with replacement, then images within each seed. Images of the base and of the trained model are
    resampled together, because they share prompts and seeds. With three seeds, the interval covers less than 95% if
    seeds differ more than images. A mean over pairs of images has twice the error that the per-image means show (a
    U-statistic of degree 2, Hoeffding 1948), so the deviations of these metrics count twice.
    """
    metrics = dict(readings)
    if "control_agreement" in metrics:
        metrics["control_less_shuffled"] = metrics["control_agreement"] - metrics["control_agreement_shuffled"]
    seeds = len(next(iter(metrics.values())))
    rng = generator(0, streams.BOOTSTRAP)
    resampled: dict[str, list[float]] = {key: [] for key in metrics}
    for _ in range(RESAMPLES):
        rows = rng.integers(seeds, size=(seeds, 1))
        columns = {n: rng.integers(n, size=(seeds, n)) for n in sorted({v.shape[1] for v in metrics.values()})}
        for key, values in metrics.items():
            value, seed_mean = float(values[rows, columns[values.shape[1]]].mean()), float(values[rows[:, 0]].mean())
            resampled[key].append(2 * value - seed_mean if key.removeprefix("base_") in _PAIR_METRICS else value)
    means = {key: float(values.mean()) for key, values in metrics.items()}
    samples = {key: np.array(values) for key, values in resampled.items()}
    if ceiling is not None and {"subject_accuracy", "base_subject_accuracy"} <= metrics.keys():
        means["subject_gain"], samples["subject_gain"] = gain(means, ceiling), gain(samples, ceiling)
    if "class_distance" in metrics:
        means["class_diversity"] = means["class_distance"] / means["base_class_distance"]
        samples["class_diversity"] = samples["class_distance"] / samples["base_class_distance"]
    return {
        key: (means[key], float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975)))
        for key, values in samples.items()
    }
