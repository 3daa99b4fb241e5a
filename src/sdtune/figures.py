"""A run's figures: which way they go, and how they are written."""

from __future__ import annotations

import math
from typing import Any

LOWER_IS_BETTER = frozenset(
    {"validation_loss", "prior_leak", "prior_drift", "memorisation", "median_step_seconds", "peak_memory_bytes"}
    | {"artifact_bytes", "trainable_parameters", "control_agreement_shuffled", "seconds", "seconds_to_best", "steps"}
)


def finite(figures: dict[str, Any]) -> dict[str, Any]:
    """``figures``, what is NaN or infinite null with its reason: JSON has neither."""
    odd = [key for key, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
    reasons = {**figures.get("reasons", {}), **dict.fromkeys(odd, "not finite")}
    return {**figures, **dict.fromkeys(odd), "reasons": reasons} if odd else figures
