"""Loss weighting by noise level: uniform and Min-SNR."""

from __future__ import annotations

from typing import Annotated, ClassVar, Protocol

import torch
from annotated_types import Gt
from torch import Tensor

from sdtune.objective.prediction import PredictionType


class Weighting(Protocol):
    """Loss weight as a function of the noise level."""

    supports_flow: ClassVar[bool]
    """Whether the weight has a meaning for flow models too."""

    def __call__(self, snr: Tensor, kind: PredictionType) -> Tensor:
        """Loss weight of each sample, [B], for its signal-to-noise ratio ``snr`` [B] and the prediction type."""


class Uniform:
    """Weight 1 for every timestep: L_simple (Ho et al. 2020, eq. 14)."""

    supports_flow = True

    def __call__(self, snr: Tensor, kind: PredictionType) -> Tensor:
        return torch.ones_like(snr)


class MinSNR:
    """Min-SNR-gamma (Hang et al. 2023, "Efficient diffusion training via min-SNR weighting strategy", section 3.4).

    The weight of the error in x is min(SNR, gamma). It is divided by SNR for epsilon, SNR + 1 for v, 1 for sample.
    The derivation is for the noise of diffusion models.
    """

    supports_flow = False

    def __init__(self, gamma: Annotated[float, Gt(0)] = 5.0) -> None:
        self.gamma = gamma

    def __call__(self, snr: Tensor, kind: PredictionType) -> Tensor:
        clipped = snr.clamp(max=self.gamma)
        if kind == "epsilon":
            return clipped / snr
        return clipped / (snr + 1) if kind == "v_prediction" else clipped
