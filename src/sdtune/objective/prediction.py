"""Prediction types of a denoiser: noise, velocity, clean sample."""

from __future__ import annotations

from typing import Literal, get_args

from sdtune.errors import UserError

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
"""Prediction types as diffusers names them: the noise (``epsilon``, Ho et al. 2020), the velocity of diffusion
(``v_prediction``, Salimans & Ho 2022), the clean sample, and the velocity of a flow (``flow_prediction``, Lipman et al.
2023)."""


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
