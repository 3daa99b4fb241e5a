"""Metrics of a run: which are better if lower, how they are written and displayed."""

from __future__ import annotations

import math
from typing import Any

LOWER_IS_BETTER = frozenset(
    {"validation_loss", "prior_leak", "prior_drift", "memorisation", "median_step_seconds", "peak_memory_bytes"}
    | {"artifact_bytes", "trainable_parameters", "control_agreement_shuffled", "seconds", "seconds_to_best", "steps"}
)

SHARES = frozenset(
    {"subject_accuracy", "background_accuracy", "subject_gain", "style_accuracy", "object_accuracy", "prior_leak"}
)
"""Metrics that are shares of n images; their resolution is 1/n."""

OF_TRAINING = (
    *("steps", "validation_loss", "validation_step", "trainable_parameters", "artifact_bytes"),
    *("peak_memory_bytes", "median_step_seconds", "images_per_second", "seconds_to_best"),
)
"""Metrics of ``metrics.json`` from the training; ``sdtune evaluate`` does not recompute them."""


def finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON lacks, by null and add a reason."""
    not_finite = [key for key, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    reasons = {**metrics.get("reasons", {}), **dict.fromkeys(not_finite, "not finite")}
    return {**metrics, **dict.fromkeys(not_finite), "reasons": reasons} if not_finite else metrics


def unit(value: float, metric: str, digits: int = 4) -> str:
    """Format ``value`` with the unit of ``metric``; numbers without unit get ``digits`` significant digits."""
    if metric.endswith("_bytes"):
        return f"{value / 1024**2:,.2f} MiB" if value < 10 * 1024**2 else f"{value / 1024**2:,.0f} MiB"
    if metric == "seconds" or metric.startswith("seconds_"):
        return f"{value:,.0f} s"
    if metric in ("trainable_parameters", "steps"):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
