"""Training loss, one value per sample; :mod:`sdtune.methods.base` averages it."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from sdtune.errors import UserError
from sdtune.objective.path import ProbabilityPath
from sdtune.objective.prediction import PredictionType
from sdtune.objective.timesteps import Timesteps
from sdtune.objective.weighting import Uniform, Weighting


class Objective:
    """Weighted mean squared error of the denoiser's output (Ho et al. 2020, eq. 14, generalized).

    Args:
        weighting: loss weight of each noise level; uniform if None.
        offset_noise: strength of additional noise with one value per sample and channel, which lets a model learn to
            change the mean brightness of an image (Guttenberg 2023, "Diffusion with offset noise", uses 0.1).
        timesteps: distribution of the timesteps; the model's own if None.
    """

    def __init__(
        self,
        weighting: Weighting | None = None,
        offset_noise: Annotated[float, Ge(0)] = 0.0,
        timesteps: Timesteps | None = None,
    ) -> None:
        self.weighting = weighting or Uniform()
        self.offset_noise = offset_noise
        self.timesteps = timesteps or Timesteps()

    def check(self, prediction_type: PredictionType) -> None:
        """Raise UserError if the weighting has no meaning for a model with this prediction type."""
        # A weighting of the user's may say nothing about flow models.
        if prediction_type == "flow_prediction" and not getattr(self.weighting, "supports_flow", False):
            raise UserError(
                f"{type(self.weighting).__name__} has no meaning for a flow model",
                key="objective.weighting",
                remedy="set objective=simple, or supports_flow = True in a class of your own",
            )

    def plain(self) -> Objective:
        """Unweighted objective (L_simple) for validation, so that runs with different objectives are comparable."""
        return Objective()

    def __call__(
        self,
        output: Tensor,
        *,
        path: ProbabilityPath,
        clean: Tensor,
        noise: Tensor,
        t: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Loss of each sample, [B], in the dtype of the target (float32 in training).

        Args:
            output: output of the denoiser, [B, C, h, w].
            path: the probability path of the model.
            clean: latents without noise, [B, C, h, w].
            noise: the noise that was added, [B, C, h, w].
            t: times on the path, [B].
            mask: [B, 1, h, w] in [0, 1]. The loss of a sample is then the mean over the masked area, so that small and
                large objects have the same weight; an empty mask gives 0.
        """
        expected = path.target(clean, noise, t)
        squares = (output.to(expected.dtype) - expected).square()
        errors = squares.flatten(1).mean(1)
        if mask is not None:
            weights = mask.to(squares.dtype).expand_as(squares).flatten(1)
            errors = (squares.flatten(1) * weights).sum(1) / weights.sum(1).clamp(min=1)
        return errors * self.weighting(path.snr(t), path.prediction_type).to(errors.dtype)
