"""The diffusion loss, per sample; one place reduces it (:mod:`sdtune.methods.base`)."""

from __future__ import annotations

from torch import Tensor

from sdtune.objective.prediction import PredictionType, target
from sdtune.objective.schedule import NoiseSchedule
from sdtune.objective.weighting import Uniform, Weighting


class Objective:
    """Weighted mean squared error between a UNet's output and its target (Ho et al. 2020, eq. 14, generalised)."""

    def __init__(self, weighting: Weighting | None = None) -> None:
        self.weighting = weighting or Uniform()

    def __call__(
        self,
        output: Tensor,
        *,
        kind: PredictionType,
        schedule: NoiseSchedule,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
    ) -> Tensor:
        """Losses [B] in float32 (float64 if the output is), from ``output``, ``clean`` and ``noise`` [B, C, h, w]."""
        wanted = target(kind, schedule, clean, noise, timesteps)
        output = output.to(wanted.dtype)
        errors = (output - wanted).square().flatten(1).mean(1)
        return errors * self.weighting(schedule.snr(timesteps), kind).to(errors.dtype)
