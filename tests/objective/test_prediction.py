"""What the UNet is asked for, against the formulas and diffusers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler

from sdtune.objective import PredictionType, clean_from, target
from sdtune.objective.prediction import check_prediction_type

KINDS: tuple[PredictionType, ...] = get_args(PredictionType)
SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def test_the_target_is_the_noise_the_sample_or_the_velocity(case) -> None:
    schedule, clean, noise, _, timesteps = case
    assert target("epsilon", schedule, clean, noise, timesteps) is noise
    assert target("sample", schedule, clean, noise, timesteps) is clean
    velocity = target("v_prediction", schedule, clean, noise, timesteps)
    for i, t in enumerate(timesteps.tolist()):
        abar = float(schedule.alphas_cumprod[t])
        torch.testing.assert_close(velocity[i], abar**0.5 * noise[i] - (1 - abar) ** 0.5 * clean[i], rtol=0, atol=1e-12)


def test_the_velocity_is_that_of_diffusers(case) -> None:
    schedule, clean, noise, _, timesteps = case
    theirs = DDPMScheduler(**SD15).get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(target("v_prediction", schedule, clean, noise, timesteps), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_output_gives_the_clean_sample_back(case, kind: PredictionType) -> None:
    schedule, clean, noise, _, timesteps = case
    perfect = target(kind, schedule, clean, noise, timesteps)
    noisy = schedule.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(clean_from(kind, schedule, perfect, noisy, timesteps), clean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_any_output_gives_the_clean_sample_of_diffusers(case, kind: PredictionType) -> None:
    schedule, clean, noise, output, timesteps = case
    noisy = schedule.add_noise(clean, noise, timesteps)
    theirs = DDPMScheduler(**SD15, prediction_type=kind, clip_sample=False)
    ours = clean_from(kind, schedule, output, noisy, timesteps)
    for i, t in enumerate(timesteps.tolist()):
        step = theirs.step(output[i : i + 1], t, noisy[i : i + 1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours[i : i + 1], step.pred_original_sample, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_known_types_pass(kind: str) -> None:
    assert check_prediction_type(kind) == kind


def test_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'flow' is not one of epsilon, v_prediction, sample"):
        check_prediction_type("flow")
