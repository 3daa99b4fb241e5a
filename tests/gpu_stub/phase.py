"""``Phase``: what one part of a run cost on the stub GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

WARM_UP = 4
"""Micro-batches before the measured ones; the caching allocator and the optimizer's state are settled then."""


@dataclass
class Phase:
    """One call of a measured function.

    Attributes:
        before, peak, after: bytes that torch has allocated on the device.
        reserved: peak of the bytes that torch's allocator has taken from the driver.
    """

    name: str
    before: int
    peak: int = 0
    after: int = 0
    reserved: int = 0
    seconds: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)
