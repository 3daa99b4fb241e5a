"""Loss weighting by noise level: uniform, Min-SNR."""

from __future__ import annotations

from typing import Annotated, Protocol

import torch
from annotated_types import Gt
from torch import Tensor

from sdtune.objective.prediction import PredictionType


class Weighting(Protocol):
    """From the SNR [B] and the prediction type to per-sample weights [B]."""

    def __call__(self, snr: Tensor, kind: PredictionType) -> Tensor: ...


class Uniform:
    """Every timestep counts the same: L_simple (Ho et al. 2020, eq. 14)."""

    def __call__(self, snr: Tensor, kind: PredictionType) -> Tensor:
        return torch.ones_like(snr)


class MinSNR:
    """min-SNR-gamma (Hang et al. 2023, "Efficient diffusion training via min-SNR weighting strategy", section 3.4).

    In terms of x the weight is min(SNR, gamma); each prediction type divides by its own factor: SNR for epsilon,
    SNR + 1 for v, 1 for the sample.
    """

    def __init__(self, gamma: Annotated[float, Gt(0)] = 5.0) -> None:
        self.gamma = gamma

    def __call__(self, snr: Tensor, kind: PredictionType) -> Tensor:
        clipped = snr.clamp(max=self.gamma)
        if kind == "epsilon":
            return clipped / snr
        return clipped / (snr + 1) if kind == "v_prediction" else clipped
