"""Probability paths: noisy samples, targets, and the distribution of the times, compared to formulas and diffusers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from sdtune.errors import UserError
from sdtune.objective import DDPMPath, FlowPath, Timesteps
from sdtune.objective.path import path_from_config
from sdtune.randomness import generator

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def drawn(path: Any, settings: Timesteps, count: int = 4000) -> np.ndarray:
    return np.array([path.draw(generator(0, "t", step, 0), settings) for step in range(count)])


# --- diffusion


def test_target_is_the_noise_the_sample_or_the_velocity(case) -> None:
    schedule, clean, noise, _, timesteps = case
    assert DDPMPath(schedule, "epsilon").target(clean, noise, timesteps) is noise
    assert DDPMPath(schedule, "sample").target(clean, noise, timesteps) is clean
    velocity = DDPMPath(schedule, "v_prediction").target(clean, noise, timesteps)
    for i, t in enumerate(timesteps.tolist()):
        abar = float(schedule.alphas_cumprod[t])
        torch.testing.assert_close(velocity[i], abar**0.5 * noise[i] - (1 - abar) ** 0.5 * clean[i], rtol=0, atol=1e-12)


def test_velocity_of_diffusion_equals_diffusers(case) -> None:
    schedule, clean, noise, _, timesteps = case
    expected = DDPMScheduler(**SD15).get_velocity(clean, noise, timesteps)
    velocity = DDPMPath(schedule, "v_prediction").target(clean, noise, timesteps)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)


def test_diffusion_draws_whole_steps(case) -> None:
    path = DDPMPath(case.schedule, "epsilon")
    uniform = drawn(path, Timesteps())
    assert uniform.dtype == np.int64
    assert (uniform == [int(generator(0, "t", step, 0).integers(1000)) for step in range(4000)]).all()
    middle = drawn(path, Timesteps("logit_normal"))
    assert middle.min() >= 0
    assert middle.max() <= 999
    assert np.mean((middle > 250) & (middle < 750)) > 0.7 > np.mean((uniform > 250) & (uniform < 750))
    assert drawn(path, Timesteps(shift=3.0)).mean() > 600
    assert [path.at((k + 0.5) / 8) for k in range(8)] == [62, 187, 312, 437, 562, 687, 812, 937]


# --- flow


def test_sample_of_a_flow_equals_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    clean, noise = torch.randn(2, 5, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 10, 500, 990, 999])
    times = scheduler.sigmas[index]
    expected = scheduler.scale_noise(clean, scheduler.timesteps[index], noise)
    torch.testing.assert_close(FlowPath().sample(clean, noise, times.double()), expected)
    assert torch.equal(FlowPath().timesteps(times.double()), scheduler.timesteps[index])
    assert torch.equal(FlowPath().target(clean, noise, times), noise - clean)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shift_equals_that_of_diffusers(shift: float) -> None:
    expected = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
    u = np.linspace(1, 1000, 1000)[::-1] / 1000

    class Fixed:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return 1 - self.value

    actual = [Timesteps("uniform", shift).draw(Fixed(value), default_kind="uniform", default_shift=7.0) for value in u]
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5)


def test_flow_draws_logit_normal_times_with_the_shift_of_the_model() -> None:
    path = FlowPath(shift=3.0)
    own = drawn(path, Timesteps())
    assert own.dtype == np.float64
    assert len(set(own.tolist())) == len(own)
    assert own.min() > 0
    assert own.max() <= 1
    normal = np.array([generator(0, "t", step, 0).standard_normal() for step in range(4000)])
    u = 1 / (1 + np.exp(-normal))
    np.testing.assert_allclose(own, 3 * u / (1 + 2 * u))
    assert np.median(own) == pytest.approx(0.75, abs=0.02)
    assert np.median(drawn(path, Timesteps(shift=1.0))) == pytest.approx(0.5, abs=0.02)
    uniform = drawn(path, Timesteps("uniform", 1.0))
    assert np.quantile(uniform, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
    assert path.at(1.5 / 8) == 1.5 / 8


def test_snr_of_a_flow() -> None:
    snr = FlowPath().snr(torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64))
    assert snr.tolist() == [9.0, 1.0, 0.0]
    assert snr.dtype == torch.float32


# --- configs


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        (FLOW, 3.0),
        ({**FLOW, "shift": 1.5}, 1.5),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 2}, 2.0),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, 3.0),
    ],
)
def test_flow_models_are_recognized_with_their_shift(config: dict[str, Any], shift: float) -> None:
    path = path_from_config(config)
    assert isinstance(path, FlowPath)
    assert (path.shift, path.prediction_type) == (shift, "flow_prediction")
    assert math.isclose(float(path.timesteps(torch.tensor([0.5]))), 500)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "is that of an EDM model"),
        ({**FLOW, "use_dynamic_shifting": True}, "shifts the noise levels by the image size"),
        ({**FLOW, "shift": "big"}, "shift 'big' in the scheduler config is not a positive number"),
        ({**SD15, "prediction_type": "noise"}, "'noise' is not one of epsilon"),
    ],
)
def test_other_noise_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        path_from_config(config)
