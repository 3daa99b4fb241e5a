"""Every method computes predictions and gradients only through its model executor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from method_cases import METHODS, Case
from running import Spy, fit
from sdtune.training.executor import LocalExecutor


class CountingExecutor(LocalExecutor):
    def __init__(self) -> None:
        self.predicted = self.backwards = 0

    def predict(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.predicted += 1
        return super().predict(*args, **kwargs)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.backwards += 1
        super().backward(loss, *args, **kwargs)


@pytest.mark.parametrize("name", METHODS)
def test_every_step_uses_the_executor(name: str, tiny: Path, images: Path) -> None:
    case = Case(name)
    default, counted, executor = Spy(), Spy(), CountingExecutor()
    fit(case.model(tiny), case.data(tiny, images), 2, [default])
    model = case.model(tiny)
    model.executor = executor
    fit(model, case.data(tiny, images), 2, [counted])
    assert (executor.predicted, executor.backwards) == (2, 2)
    assert counted.losses == default.losses
