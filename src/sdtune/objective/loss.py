"""The diffusion loss, one value per sample; :mod:`sdtune.methods.base` reduces it."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from sdtune.objective.prediction import PredictionType, target
from sdtune.objective.schedule import NoiseSchedule
from sdtune.objective.weighting import Uniform, Weighting


class Objective:
    """Weighted mean squared error between a UNet's output and its target (Ho et al. 2020, eq. 14, generalised).

    Args:
        weighting: how much each noise level counts.
        offset_noise: strength of noise that is one number a channel, added to the noise so that a model learns to move
            an image's mean brightness (Guttenberg 2023, "Diffusion with offset noise"; there 0.1).
    """

    def __init__(self, weighting: Weighting | None = None, offset_noise: Annotated[float, Ge(0)] = 0.0) -> None:
        self.weighting = weighting or Uniform()
        self.offset_noise = offset_noise

    def plain(self) -> Objective:
        """L_simple, whatever is trained: what validation measures, so that runs of several objectives compare."""
        return Objective()

    def __call__(
        self,
        output: Tensor,
        *,
        kind: PredictionType,
        schedule: NoiseSchedule,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Losses [B] in float32 (float64 if the output is), from ``output``, ``clean`` and ``noise`` [B, C, h, w].

        With a ``mask`` [B, 1, h, w] in [0, 1] a sample's loss is the mean over what the mask holds, so that a small
        object teaches as much as a large one; a mask of nothing gives 0.
        """
        wanted = target(kind, schedule, clean, noise, timesteps)
        squares = (output.to(wanted.dtype) - wanted).square()
        errors = squares.flatten(1).mean(1)
        if mask is not None:
            weights = mask.to(squares.dtype).expand_as(squares).flatten(1)
            errors = (squares.flatten(1) * weights).sum(1) / weights.sum(1).clamp(min=1)
        return errors * self.weighting(schedule.snr(timesteps), kind).to(errors.dtype)
