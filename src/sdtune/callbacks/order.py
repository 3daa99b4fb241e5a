"""The order in which callbacks are called."""

from __future__ import annotations

from collections.abc import Iterable

from pytorch_lightning.callbacks import Callback


def by_priority(callbacks: Iterable[Callback]) -> list[Callback]:
    """``callbacks`` by their class's ``priority``, ascending; 0 where there is none, and ties stay in their order.

    Averages move before anything reads them, and metrics are written before a checkpoint is.
    """
    return sorted(callbacks, key=lambda callback: getattr(callback, "priority", 0))
