"""Metric over several seeds."""

from __future__ import annotations

from dataclasses import dataclass

from sdtune.runs.metrics import unit


@dataclass(frozen=True)
class Value:
    """Mean of a metric over the seeds, with a 95% bootstrap interval or a standard deviation (``spread``)."""

    mean: float
    interval: tuple[float, float] | None = None
    spread: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """Lower and upper bound: the interval, or mean minus and plus one standard deviation."""
        return self.interval or (self.mean - (self.spread or 0.0), self.mean + (self.spread or 0.0))

    def shown(self, figure: str) -> str:
        """Mean and interval or standard deviation as text, in the unit of the metric ``figure``."""
        if self.interval is not None:
            return f"{self.mean:.3f} ({self.interval[0]:.3f} to {self.interval[1]:.3f})"
        spread = f" ± {unit(self.spread, figure, 2)}" if self.spread else ""
        return unit(self.mean, figure) + spread
