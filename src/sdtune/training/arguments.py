"""Constructor arguments shared by all methods."""

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
    """Average of the trained weights, such as an EMA."""

    def swapped_parameters(self, module: nn.Module) -> AbstractContextManager[None]:
        """Context manager that temporarily replaces the trained weights of ``module`` by the average."""


OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Creates an optimizer from parameter groups."""


class Common(TypedDict, total=False):
    """Keyword arguments of :class:`sdtune.methods.base.Adapter`, which documents them."""

    backbone: Pretrained
    objective: Objective
    optimizer: OptimizerFactory
    lr_schedule: LRSchedule
    new_tokens: Sequence[NewToken]
    tokens_lr: float | None
    gradient_checkpointing: bool
    offload: bool
    vae_tiling: bool
    seed: int
