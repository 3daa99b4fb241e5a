"""The order in which callbacks are called."""

from __future__ import annotations

from collections.abc import Iterable

from pytorch_lightning.callbacks import Callback


def by_priority(callbacks: Iterable[Callback]) -> list[Callback]:
    """Sort ``callbacks`` by the ``priority`` of their class, ascending (default 0); the sort is stable.

    The EMA is updated before other callbacks read it, and metrics are written before a checkpoint is saved.
    """
    return sorted(callbacks, key=lambda callback: getattr(callback, "priority", 0))
