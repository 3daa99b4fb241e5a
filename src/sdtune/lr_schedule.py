"""Learning-rate schedules over optimizer steps, as factors on the optimizer's learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Interval


def warmup_limit(steps: int) -> int:
    """Maximum number of warm-up steps in a training of ``steps`` optimizer steps: a tenth."""
    return steps // 10


class LRSchedule(ABC):
    """Base class: linear warm-up, then the subclass's :meth:`shape`.

    Args:
        warmup_steps: optimizer steps of warm-up, clamped to a tenth of the run.
    """

    def __init__(self, warmup_steps: Annotated[int, Ge(0)] = 0) -> None:
        self.warmup_steps = warmup_steps

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Factor after the warm-up at ``progress``, from 0 to 1."""

    def __call__(self, step: int, total: int) -> float:
        """Factor at optimizer step ``step`` (from 0) of ``total``; above 0 in warm-up, so that no step is wasted."""
        warmup = min(self.warmup_steps, warmup_limit(total))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.shape(min(1.0, (step - warmup) / max(1, total - warmup)))


class Constant(LRSchedule):
    """Constant factor 1 after the warm-up."""

    def shape(self, progress: float) -> float:
        return 1.0


class Cosine(LRSchedule):
    """Cosine decay from 1 to ``floor`` (Loshchilov & Hutter 2017, eq. 5, one cycle)."""

    def __init__(
        self, warmup_steps: Annotated[int, Ge(0)] = 0, floor: Annotated[float, Interval(ge=0, le=1)] = 0.0
    ) -> None:
        super().__init__(warmup_steps)
        self.floor = floor

    def shape(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Polynomial(LRSchedule):
    """Polynomial decay, (1 - progress) ** power, from 1 to ``floor``; ``power`` 1 is linear."""

    def __init__(
        self,
        warmup_steps: Annotated[int, Ge(0)] = 0,
        power: Annotated[float, Gt(0)] = 1.0,
        floor: Annotated[float, Interval(ge=0, le=1)] = 0.0,
    ) -> None:
        super().__init__(warmup_steps)
        self.power, self.floor = power, floor

    def shape(self, progress: float) -> float:
        return float(self.floor + (1 - self.floor) * (1 - progress) ** self.power)


def apply_current_rates(schedule: Any) -> None:
    """Set the optimizer's learning rates to the schedule's values at its current step.

    A loaded checkpoint contains the rates of the original run length, which differ if the run is extended.
    """
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    for group, rate, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(schedule.last_epoch)
