"""Prediction targets, compared to the formulas and to diffusers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler

from sdtune.errors import UserError
from sdtune.objective import PredictionType, target
from sdtune.objective.prediction import check_prediction_type

KINDS: tuple[PredictionType, ...] = get_args(PredictionType)
SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def test_target_is_the_noise_the_sample_or_the_velocity(case) -> None:
    schedule, clean, noise, _, timesteps = case
    assert target("epsilon", schedule, clean, noise, timesteps) is noise
    assert target("sample", schedule, clean, noise, timesteps) is clean
    velocity = target("v_prediction", schedule, clean, noise, timesteps)
    for i, t in enumerate(timesteps.tolist()):
        abar = float(schedule.alphas_cumprod[t])
        torch.testing.assert_close(velocity[i], abar**0.5 * noise[i] - (1 - abar) ** 0.5 * clean[i], rtol=0, atol=1e-12)


def test_velocity_equals_diffusers(case) -> None:
    schedule, clean, noise, _, timesteps = case
    expected = DDPMScheduler(**SD15).get_velocity(clean, noise, timesteps)
    velocity = target("v_prediction", schedule, clean, noise, timesteps)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_known_prediction_types_are_accepted(kind: str) -> None:
    assert check_prediction_type(kind) == kind


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(UserError, match=r"'flow' is not one of epsilon, v_prediction, sample"):
        check_prediction_type("flow")
