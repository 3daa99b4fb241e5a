"""Loss of each sample, compared to the formula computed element by element."""

from __future__ import annotations

import pytest
import torch

from sdtune.errors import UserError
from sdtune.objective import DDPMPath, FlowPath, MinSNR, Objective, PredictionType, Timesteps, Uniform

KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_each_sample_is_the_weighted_mean_squared_error(
    case, kind: PredictionType, gamma: float | None
) -> None:
    schedule, clean, noise, output, timesteps = case
    objective = Objective(MinSNR(gamma) if gamma else None)
    losses = objective(output, path=DDPMPath(schedule, kind), clean=clean, noise=noise, t=timesteps)
    assert losses.shape == (8,)
    assert losses.dtype == torch.float64
    for i, t in enumerate(timesteps.tolist()):
        abar = float(schedule.alphas_cumprod[t])
        snr = abar / (1 - abar)
        target, divisor = {
            "epsilon": (noise[i], snr),
            "v_prediction": (abar**0.5 * noise[i] - (1 - abar) ** 0.5 * clean[i], snr + 1),
            "sample": (clean[i], 1),
        }[kind]
        weight = min(snr, gamma) / divisor if gamma else 1
        expected = weight * sum((output[i] - target).flatten().tolist()[k] ** 2 for k in range(60)) / 60
        # The Min-SNR weight is float32, which limits the precision.
        assert float(losses[i]) == pytest.approx(expected, rel=1e-6 if gamma else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_a_sample_is_independent_of_the_other_samples(case, kind: PredictionType) -> None:
    schedule, clean, noise, output, timesteps = case

    def losses(rows: slice) -> torch.Tensor:
        return Objective(MinSNR())(
            output[rows], path=DDPMPath(schedule, kind), clean=clean[rows], noise=noise[rows], t=timesteps[rows]
        )

    torch.testing.assert_close(torch.cat([losses(slice(i, i + 1)) for i in range(8)]), losses(slice(None)))


def test_loss_of_a_half_precision_output_is_computed_in_float32(case) -> None:
    schedule, clean, noise, output, timesteps = case
    losses = Objective()(
        output.bfloat16(),
        path=DDPMPath(schedule, "epsilon"),
        clean=clean.float(),
        noise=noise.float(),
        t=timesteps,
    )
    assert losses.dtype == torch.float32
    exact = (output.bfloat16().double() - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=0)


def test_gradient_equals_the_formula(case) -> None:
    schedule, clean, noise, output, timesteps = case
    output = output.clone().requires_grad_()
    Objective()(output, path=DDPMPath(schedule, "epsilon"), clean=clean, noise=noise, t=timesteps).mean().backward()
    torch.testing.assert_close(output.grad, 2 * (output.detach() - noise) / output.numel())


def test_masked_loss_is_the_mean_over_the_masked_area(case) -> None:
    schedule, clean, noise, output, timesteps = case
    mask = torch.zeros(8, 1, *clean.shape[2:], dtype=torch.float32)
    mask[:, :, 0] = 1
    mask[:, :, 1, 0] = 0.5
    mask[3] = 0

    def losses(mask: torch.Tensor | None) -> torch.Tensor:
        return Objective()(output, path=DDPMPath(schedule, "epsilon"), clean=clean, noise=noise, t=timesteps, mask=mask)

    masked_losses = losses(mask)
    for i in range(8):
        weights = mask[i].double().expand_as(clean[i])
        total = float(weights.sum())
        expected = float(((output[i] - noise[i]) ** 2 * weights).sum()) / total if total else 0
        assert float(masked_losses[i]) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(losses(torch.ones_like(mask)), losses(None))


def test_loss_of_a_flow_is_that_of_the_velocity(case) -> None:
    _, clean, noise, output, _ = case
    t = torch.linspace(0.1, 1, 8, dtype=torch.float64)
    losses = Objective()(output, path=FlowPath(), clean=clean, noise=noise, t=t)
    torch.testing.assert_close(losses, (output - (noise - clean)).square().flatten(1).mean(1))


def test_weighting_without_a_meaning_for_flow_models_is_refused() -> None:
    with pytest.raises(UserError, match=r"^objective\.weighting: MinSNR has no meaning for a flow"):
        Objective(MinSNR()).check("flow_prediction")
    Objective(Uniform(), timesteps=Timesteps("logit_normal")).check("flow_prediction")
    for kind in KINDS:
        Objective(MinSNR()).check(kind)
