"""Prediction types of a UNet: noise (``epsilon``), velocity (``v_prediction``), clean sample (``sample``)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from sdtune.errors import UserError
from sdtune.objective.schedule import NoiseSchedule

PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""Prediction types as diffusers names them: Ho et al. 2020 (epsilon), Salimans & Ho 2022 (v)."""


def check_prediction_type(prediction_type: str) -> PredictionType:
    """Return ``prediction_type`` unchanged if it is known.

    Raises:
        UserError: the prediction type is unknown.
    """
    if prediction_type not in get_args(PredictionType):
        raise UserError(
            f"{prediction_type!r} is not one of {', '.join(get_args(PredictionType))}", key="backbone.prediction_type"
        )
    return prediction_type  # type: ignore[return-value]


def target(kind: PredictionType, schedule: NoiseSchedule, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Target of the UNet's output, [B, ...].

    epsilon: the noise. v: sqrt(abar) noise - sqrt(1 - abar) x (Salimans & Ho 2022, appendix D). sample: x (``clean``).
    """
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    return schedule.alpha(timesteps, clean) * noise - schedule.sigma(timesteps, clean) * clean
