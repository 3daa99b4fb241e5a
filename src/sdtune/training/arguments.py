"""Constructor arguments that all methods share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypedDict

import torch
from torch import nn

from sdtune.backbone import Pretrained
from sdtune.backbone.new_tokens import NewToken
from sdtune.lr_schedule import LRSchedule
from sdtune.objective import Objective


class Average(Protocol):
    """An average of the trained weights, which can stand in for them."""

    def swapped(self, module: nn.Module) -> AbstractContextManager[None]: ...


MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class Common(TypedDict, total=False):
    """What every method is given beside its own settings."""

    backbone: Pretrained
    objective: Objective
    optimizer: MakeOptimizer
    lr_schedule: LRSchedule
    new_tokens: Sequence[NewToken]
    tokens_lr: float | None
    gradient_checkpointing: bool
    offload: bool
    vae_tiling: bool
    seed: int
