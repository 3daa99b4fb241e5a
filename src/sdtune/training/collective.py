"""Exchange of values between the processes of a run."""

from __future__ import annotations

from typing import TypeVar

import pytorch_lightning as pl

T = TypeVar("T")


def gathered(trainer: pl.Trainer, value: T) -> list[T]:
    """The ``value`` of each process, by global rank; every process must call it."""
    return [trainer.strategy.broadcast(value, src=rank) for rank in range(trainer.world_size)]
