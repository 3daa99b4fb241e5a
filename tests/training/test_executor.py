"""An adapter computes through its executor alone: predictions in training, validation and previews, and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from method_cases import METHODS, Case
from running import Spy, fit
from sdtune.training.executor import LocalExecutor


class Counting(LocalExecutor):
    def __init__(self) -> None:
        self.predicted = self.backwards = 0

    def predict(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.predicted += 1
        return super().predict(*args, **kwargs)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.backwards += 1
        super().backward(loss, *args, **kwargs)


@pytest.mark.parametrize("name", METHODS)
def test_every_step_goes_through_the_executor(name: str, tiny: Path, images: Path) -> None:
    case = Case(name)
    plain, counted, executor = Spy(), Spy(), Counting()
    fit(case.model(tiny), case.data(tiny, images), 2, [plain])
    model = case.model(tiny)
    model.executor = executor
    fit(model, case.data(tiny, images), 2, [counted])
    assert (executor.predicted, executor.backwards) == (2, 2)
    assert counted.losses == plain.losses
