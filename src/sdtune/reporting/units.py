"""Figures as people read them."""

from __future__ import annotations


def unit(value: float, metric: str, digits: int = 4) -> str:
    """``value`` in the unit that suits ``metric``; plain numbers to so many significant ``digits``."""
    if metric.endswith("_bytes"):
        return f"{value / 1024**2:,.2f} MiB" if value < 10 * 1024**2 else f"{value / 1024**2:,.0f} MiB"
    if metric == "seconds" or metric.startswith("seconds_"):
        return f"{value:,.0f} s"
    if metric in ("trainable_parameters", "steps"):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
