"""The loss of each sample, against a formula written out by hand."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from sdtune.objective import MinSNR, Objective, PredictionType

KINDS: tuple[PredictionType, ...] = get_args(PredictionType)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_each_samples_loss_is_the_weighted_mean_square(case, kind: PredictionType, gamma: float | None) -> None:
    schedule, clean, noise, output, timesteps = case
    objective = Objective(MinSNR(gamma) if gamma else None)
    losses = objective(output, kind=kind, schedule=schedule, clean=clean, noise=noise, timesteps=timesteps)
    assert losses.shape == (8,)
    assert losses.dtype == torch.float64
    for i, t in enumerate(timesteps.tolist()):
        abar = float(schedule.alphas_cumprod[t])
        snr = abar / (1 - abar)
        wanted, divisor = {
            "epsilon": (noise[i], snr),
            "v_prediction": (abar**0.5 * noise[i] - (1 - abar) ** 0.5 * clean[i], snr + 1),
            "sample": (clean[i], 1),
        }[kind]
        weight = min(snr, gamma) / divisor if gamma else 1
        expected = weight * sum((output[i] - wanted).flatten().tolist()[k] ** 2 for k in range(60)) / 60
        # The weight is float32.
        assert float(losses[i]) == pytest.approx(expected, rel=1e-6 if gamma else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_samples_loss_does_not_know_its_neighbours(case, kind: PredictionType) -> None:
    schedule, clean, noise, output, timesteps = case

    def losses(rows: slice) -> torch.Tensor:
        return Objective(MinSNR())(
            output[rows], kind=kind, schedule=schedule, clean=clean[rows], noise=noise[rows], timesteps=timesteps[rows]
        )

    torch.testing.assert_close(torch.cat([losses(slice(i, i + 1)) for i in range(8)]), losses(slice(None)))


def test_a_half_precision_output_is_compared_in_float32(case) -> None:
    schedule, clean, noise, output, timesteps = case
    losses = Objective()(
        output.bfloat16(),
        kind="epsilon",
        schedule=schedule,
        clean=clean.float(),
        noise=noise.float(),
        timesteps=timesteps,
    )
    assert losses.dtype == torch.float32
    exact = (output.bfloat16().double() - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=0)


def test_the_gradient_is_that_of_the_formula(case) -> None:
    schedule, clean, noise, output, timesteps = case
    output = output.clone().requires_grad_()
    Objective()(
        output, kind="epsilon", schedule=schedule, clean=clean, noise=noise, timesteps=timesteps
    ).mean().backward()
    torch.testing.assert_close(output.grad, 2 * (output.detach() - noise) / output.numel())


def test_a_mask_is_a_mean_over_what_it_holds(case) -> None:
    schedule, clean, noise, output, timesteps = case
    mask = torch.zeros(8, 1, *clean.shape[2:], dtype=torch.float32)
    mask[:, :, 0] = 1
    mask[:, :, 1, 0] = 0.5
    mask[3] = 0

    def losses(mask: torch.Tensor | None) -> torch.Tensor:
        return Objective()(
            output, kind="epsilon", schedule=schedule, clean=clean, noise=noise, timesteps=timesteps, mask=mask
        )

    found = losses(mask)
    for i in range(8):
        weights = mask[i].double().expand_as(clean[i])
        total = float(weights.sum())
        wanted = float(((output[i] - noise[i]) ** 2 * weights).sum()) / total if total else 0
        assert float(found[i]) == pytest.approx(wanted, rel=1e-9)
    torch.testing.assert_close(losses(torch.ones_like(mask)), losses(None))
