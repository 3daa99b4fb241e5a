"""Diffusion loss, one value per sample; :mod:`sdtune.methods.base` averages it."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from sdtune.objective.prediction import PredictionType, target
from sdtune.objective.schedule import NoiseSchedule
from sdtune.objective.weighting import Uniform, Weighting


class Objective:
    """Diffusion loss: weighted mean squared error of the UNet's output (Ho et al. 2020, eq. 14, generalized).

    Args:
        weighting: loss weight of each noise level; uniform if None.
        offset_noise: strength of additional noise with one value per sample and channel, which lets a model learn to
            change the mean brightness of an image (Guttenberg 2023, "Diffusion with offset noise", uses 0.1).
    """

    def __init__(self, weighting: Weighting | None = None, offset_noise: Annotated[float, Ge(0)] = 0.0) -> None:
        self.weighting = weighting or Uniform()
        self.offset_noise = offset_noise

    def plain(self) -> Objective:
        """Unweighted objective (L_simple) for validation, so that runs with different objectives are comparable."""
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
        """Loss of each sample, [B], in the dtype of the target (float32 in training).

        Args:
            output: output of the UNet, [B, C, h, w].
            kind: prediction type of the UNet.
            clean: latents without noise, [B, C, h, w].
            noise: the noise that was added, [B, C, h, w].
            timesteps: int64 [B].
            mask: [B, 1, h, w] in [0, 1]. The loss of a sample is then the mean over the masked area, so that small and
                large objects have the same weight; an empty mask gives 0.
        """
        expected = target(kind, schedule, clean, noise, timesteps)
        squares = (output.to(expected.dtype) - expected).square()
        errors = squares.flatten(1).mean(1)
        if mask is not None:
            weights = mask.to(squares.dtype).expand_as(squares).flatten(1)
            errors = (squares.flatten(1) * weights).sum(1) / weights.sum(1).clamp(min=1)
        return errors * self.weighting(schedule.snr(timesteps), kind).to(errors.dtype)
