"""A metric over several seeds."""

from __future__ import annotations

from dataclasses import dataclass

from sdtune.runs.metrics import unit


@dataclass(frozen=True)
class Value:
    """A metric over the seeds: its mean, and an interval's ends (95%, by bootstrap) or a standard deviation."""

    mean: float
    interval: tuple[float, float] | None = None
    spread: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """From where to where it may lie: the interval, or a standard deviation to both sides."""
        return self.interval or (self.mean - (self.spread or 0.0), self.mean + (self.spread or 0.0))

    def shown(self, figure: str) -> str:
        """Mean and spread, in the unit that suits ``metric``."""
        if self.interval is not None:
            return f"{self.mean:.3f} ({self.interval[0]:.3f} to {self.interval[1]:.3f})"
        spread = f" ± {unit(self.spread, figure, 2)}" if self.spread else ""
        return unit(self.mean, figure) + spread
