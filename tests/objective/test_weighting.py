"""Min-SNR weights for each prediction type, compared to the formulas of the paper."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from sdtune.objective import MinSNR, PredictionType, Uniform

KINDS: tuple[PredictionType, ...] = get_args(PredictionType)
SNR = torch.tensor([1e-3, 0.5, 1.0, 4.999, 5.0, 5.001, 40.0, 1e3], dtype=torch.float64)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize(
    ("kind", "divisor"),
    [("epsilon", lambda snr: snr), ("v_prediction", lambda snr: snr + 1), ("sample", lambda snr: 1)],
)
def test_min_snr_is_the_clipped_snr_divided_by_the_factor_of_the_prediction_type(
    kind: PredictionType, divisor, gamma: float
) -> None:
    expected = torch.tensor([min(snr, gamma) / divisor(snr) for snr in SNR.tolist()], dtype=torch.float64)
    torch.testing.assert_close(MinSNR(gamma)(SNR, kind), expected, rtol=1e-12, atol=0)


def test_default_gamma_is_5_as_in_the_paper() -> None:
    assert torch.equal(MinSNR()(SNR, "sample"), SNR.clamp(max=5.0))


def test_weighted_loss_of_an_error_in_x_is_equal_for_all_prediction_types() -> None:
    """An error e in x is e sqrt(SNR) in epsilon and e sqrt(SNR + 1) in v; weight times squared error must be equal."""
    weighting = MinSNR(5.0)
    expected = weighting(SNR, "sample")
    torch.testing.assert_close(weighting(SNR, "epsilon") * SNR, expected)
    torch.testing.assert_close(weighting(SNR, "v_prediction") * (SNR + 1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_weight_is_one(kind: PredictionType) -> None:
    assert torch.equal(Uniform()(SNR, kind), torch.ones_like(SNR))
