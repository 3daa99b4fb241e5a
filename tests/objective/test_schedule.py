"""Noise schedule, compared to diffusers and to the formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from sdtune.errors import UserError
from sdtune.objective import DDPMPath
from sdtune.objective.schedule import NoiseSchedule, betas

TRAINED = torch.linspace(1e-4, 0.03, 40).tolist()

CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000},
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
    },
    "squaredcos_cap_v2": {
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "num_train_timesteps": 1000,
    },
    "trained_betas": {
        "beta_schedule": "linear",
        "beta_start": 0.5,
        "beta_end": 0.6,
        "num_train_timesteps": 40,
        "trained_betas": TRAINED,
    },
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


def test_betas_and_alphas_cumprod_equal_diffusers(config: dict[str, Any]) -> None:
    scheduler = DDPMScheduler(**config)
    schedule = NoiseSchedule.from_config(scheduler.config)
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert len(schedule) == config["num_train_timesteps"] == len(scheduler.alphas_cumprod)
    torch.testing.assert_close(betas(config).float(), scheduler.betas, rtol=1e-5, atol=1e-8)
    # The tolerance covers the rounding of diffusers, which multiplies up to 1000 float32 factors.
    torch.testing.assert_close(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=2e-4, atol=1e-9)


def test_alphas_cumprod_is_the_cumulative_product_of_1_minus_beta() -> None:
    schedule = NoiseSchedule.from_config(CONFIGS["scaled_linear"])
    first, last = 0.00085**0.5, 0.012**0.5
    product = 1.0
    for t in range(1000):
        product *= 1 - (first + (last - first) * t / 999) ** 2
        assert float(schedule.alphas_cumprod[t]) == pytest.approx(product, rel=1e-12)


def test_alphas_cumprod_decreases_between_1_and_0(config: dict[str, Any]) -> None:
    values = NoiseSchedule.from_config(config).alphas_cumprod
    assert 0 < values.min() < values.max() < 1
    assert (values.diff() < 0).all()


def test_alpha_squared_plus_sigma_squared_is_one(config: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_config(config)
    timesteps = torch.arange(len(schedule))
    like = torch.zeros(len(schedule), 4, 2, 2, dtype=torch.float64)
    alpha, sigma = schedule.alpha(timesteps, like), schedule.sigma(timesteps, like)
    assert alpha.shape == sigma.shape == (len(schedule), 1, 1, 1)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-14)


def test_add_noise_equals_the_formula_and_diffusers(config: dict[str, Any]) -> None:
    scheduler = DDPMScheduler(**config)
    schedule = NoiseSchedule.from_config(config)
    g = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 6, 4, 5, 3, generator=g, dtype=torch.float64)
    timesteps = torch.randint(len(schedule), (6,), generator=g)
    noisy = schedule.add_noise(clean, noise, timesteps)
    assert noisy.dtype == torch.float64
    for i, t in enumerate(timesteps.tolist()):
        abar = float(torch.cumprod(1 - betas(config), 0)[t])
        torch.testing.assert_close(noisy[i], abar**0.5 * clean[i] + (1 - abar) ** 0.5 * noise[i], rtol=0, atol=1e-12)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, timesteps), rtol=1e-4, atol=1e-4)


def test_add_noise_returns_the_dtype_of_the_sample() -> None:
    schedule = NoiseSchedule.from_config(CONFIGS["scaled_linear"])
    clean = torch.randn(2, 4, 3, 3)
    assert schedule.add_noise(clean, clean, torch.tensor([0, 999])).dtype == torch.float32


def test_snr_equals_the_formula(config: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_config(config)
    timesteps = torch.arange(len(schedule))
    abar = torch.cumprod(1 - betas(config), 0)
    snr = schedule.snr(timesteps)
    assert snr.shape == (len(schedule),)
    torch.testing.assert_close(snr.double(), abar / (1 - abar), rtol=1e-6, atol=0)
    assert (snr.diff() < 0).all()


def test_zero_terminal_snr_equals_diffusers_and_ends_in_pure_noise() -> None:
    config = {**CONFIGS["scaled_linear"], "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    schedule = NoiseSchedule.from_config(config)
    plain = NoiseSchedule.from_config(CONFIGS["scaled_linear"])
    assert float(schedule.alphas_cumprod[-1]) == 0
    assert float(schedule.snr(torch.tensor([len(schedule) - 1]))) == 0
    torch.testing.assert_close(schedule.alphas_cumprod[0], plain.alphas_cumprod[0])
    expected = DDPMScheduler(**config).alphas_cumprod.double()
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-4, atol=1e-6)
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last = torch.full((3,), len(schedule) - 1)
    assert torch.equal(schedule.add_noise(clean, noise, last), noise)
    torch.testing.assert_close(DDPMPath(schedule, "v_prediction").target(clean, noise, last), -clean)


def test_zero_terminal_snr_with_epsilon_prediction_is_refused() -> None:
    with pytest.raises(UserError, match="zero_terminal_snr.*prediction_type=v_prediction"):
        NoiseSchedule.from_config({**CONFIGS["scaled_linear"], "rescale_betas_zero_snr": True})


def test_unknown_beta_schedule_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown beta_schedule 'sigmoid' in the scheduler config; .*scaled_linear"):
        NoiseSchedule.from_config({**CONFIGS["linear"], "beta_schedule": "sigmoid"})


def test_moving_to_a_device_keeps_the_values() -> None:
    schedule = NoiseSchedule.from_config(CONFIGS["linear"])
    before = schedule.alphas_cumprod.clone()
    assert schedule.to(torch.device("cpu")) is schedule
    assert torch.equal(schedule.alphas_cumprod, before)
