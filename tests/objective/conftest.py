"""Fixture with a noise schedule and a batch in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sdtune.objective import NoiseSchedule

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


class Case(NamedTuple):
    """Batch of 8 samples: timesteps are int64 [8], all other tensors float64 [8, 4, 3, 5]."""

    schedule: NoiseSchedule
    clean: Tensor
    noise: Tensor
    output: Tensor
    timesteps: Tensor


@pytest.fixture
def case() -> Case:
    g = torch.Generator().manual_seed(7)
    clean, noise, output = torch.randn(3, 8, 4, 3, 5, generator=g, dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 100, 300, 500, 700, 998, 999])
    return Case(NoiseSchedule.from_config(SD15), clean, noise, output, timesteps)
