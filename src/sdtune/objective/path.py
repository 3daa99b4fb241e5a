"""Probability paths between data and noise: DDPM (diffusion) and rectified flow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdtune.errors import UserError
from sdtune.objective.prediction import PredictionType, check_prediction_type
from sdtune.objective.schedule import NoiseSchedule
from sdtune.objective.timesteps import Timesteps

FLOW_SHIFT = 3.0
"""Shift of a flow model whose scheduler config names none: that of Stable Diffusion 3 at 1024 pixels (Esser et al.
2024, section 5.3.2)."""


class ProbabilityPath(ABC):
    """Noisy samples at a time t between the data and pure noise, and what a denoiser learns to predict there.

    Attributes:
        prediction_type: what the denoiser predicts.
        steps: number of timesteps; the denoiser is given timesteps up to this.
    """

    prediction_type: PredictionType
    steps: int

    @abstractmethod
    def sample(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy latents [B, ...] at ``t`` [B] from ``clean`` and ``noise`` [B, ...]."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Target of the denoiser's output, [B, ...]."""

    @abstractmethod
    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio at ``t`` [B], float32 [B] (Kingma et al. 2021, eq. 1)."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, settings: Timesteps) -> float:
        """Random t of one training sample."""

    @abstractmethod
    def at(self, quantile: float) -> float:
        """The t at ``quantile`` in (0, 1) of the times, for validation; the same whatever a training draws."""

    @abstractmethod
    def tensor(self, times: Sequence[float]) -> Tensor:
        """``times`` of :meth:`draw` or :meth:`at` as a tensor [B]."""

    @abstractmethod
    def timesteps(self, t: Tensor) -> Tensor:
        """Timesteps that the denoiser is given for ``t`` [B]."""

    def to(self, device: torch.device) -> ProbabilityPath:
        """Move tables to ``device`` in place, so that a step does not copy them; returns ``self``."""
        return self


class DDPMPath(ProbabilityPath):
    """Diffusion in whole steps t: z_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise (Ho et al. 2020, eq. 4)."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: PredictionType) -> None:
        self.schedule, self.prediction_type = schedule, prediction_type
        self.steps = len(schedule)

    def sample(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.schedule.add_noise(clean, noise, t)

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """As :meth:`ProbabilityPath.target`.

        epsilon: the noise. v: sqrt(abar) noise - sqrt(1 - abar) x (Salimans & Ho 2022, appendix D). sample: x.
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        return self.schedule.alpha(t, clean) * noise - self.schedule.sigma(t, clean) * clean

    def snr(self, t: Tensor) -> Tensor:
        return self.schedule.snr(t)

    def draw(self, rng: np.random.Generator, settings: Timesteps) -> int:
        if settings.kind in (None, "uniform") and settings.shift in (None, 1.0):
            return int(rng.integers(self.steps))
        return min(int(settings.draw(rng, default_kind="uniform", default_shift=1.0) * self.steps), self.steps - 1)

    def at(self, quantile: float) -> int:
        return int(quantile * self.steps)

    def tensor(self, times: Sequence[float]) -> Tensor:
        return torch.tensor(times, dtype=torch.long)

    def timesteps(self, t: Tensor) -> Tensor:
        return t

    def to(self, device: torch.device) -> DDPMPath:
        self.schedule.to(device)
        return self


class FlowPath(ProbabilityPath):
    """Rectified flow: z_t = (1 - t) x + t noise, with a real t in (0, 1] (Liu et al. 2023; Lipman et al. 2023).

    The denoiser predicts the velocity noise - x, and is given the timestep 1000 t.

    Args:
        shift: shift s of the times, t = s u / (1 + (s - 1) u) (Esser et al. 2024, eq. 23); a training may set another.
        steps: number of timesteps: the timestep at t = 1.
    """

    def __init__(self, shift: float = FLOW_SHIFT, steps: int = 1000) -> None:
        self.shift, self.steps = shift, steps
        self.prediction_type = "flow_prediction"

    def sample(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = _like(t, clean)
        return (1 - t) * clean + t * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - clean

    def snr(self, t: Tensor) -> Tensor:
        return ((1 - t) / t).square().float()

    def draw(self, rng: np.random.Generator, settings: Timesteps) -> float:
        return settings.draw(rng, default_kind="logit_normal", default_shift=self.shift)

    def at(self, quantile: float) -> float:
        return quantile

    def tensor(self, times: Sequence[float]) -> Tensor:
        return torch.tensor(times, dtype=torch.float64)

    def timesteps(self, t: Tensor) -> Tensor:
        return (self.steps * t).float()


def _like(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler config is that of a flow model."""
    is_marked = config.get("prediction_type") == "flow_prediction" or bool(config.get("use_flow_sigmas"))
    return is_marked or "FlowMatch" in str(config.get("_class_name"))


def shift_of(config: Mapping[str, Any]) -> float:
    """Shift of a flow model with this diffusers scheduler config: of its own, else :data:`FLOW_SHIFT`.

    Raises:
        UserError: the shift is not a number.
    """
    shift = config.get("shift", config.get("flow_shift"))
    if shift is None:
        return FLOW_SHIFT
    if not isinstance(shift, int | float) or not shift > 0:
        raise UserError(
            f"shift {shift!r} in the scheduler config is not a positive number",
            key="backbone.path",
            remedy="copy or download the model again",
        )
    return float(shift)


def path_from_config(config: Mapping[str, Any]) -> ProbabilityPath:
    """Probability path of a model with this diffusers scheduler config.

    Raises:
        UserError: the noise of the model is neither that of DDPM nor a rectified flow, or a value is not supported.
    """
    check_noise_process(config)
    if is_flow(config):
        return FlowPath(shift_of(config), int(config.get("num_train_timesteps", 1000)))
    prediction_type = check_prediction_type(config.get("prediction_type", "epsilon"))
    return DDPMPath(NoiseSchedule.from_config(config), prediction_type)


def check_noise_process(config: Mapping[str, Any]) -> None:
    """Raise UserError for a diffusers scheduler config of a model that is trained with another kind of noise.

    EDM models (Karras et al. 2022) get noise of a standard deviation up to 80 or more and inputs that are scaled by it.
    Training one of them with the noise of DDPM would change it without an error.
    """
    name = str(config.get("_class_name"))
    if name.startswith("EDM") or "sigma_data" in config:
        raise UserError(
            f"the scheduler config ({name}) is that of an EDM model, whose noise sdtune does not train with",
            key="backbone.path",
            remedy="use a model with a DDPM noise schedule, or a flow model",
        )
    if is_flow(config) and config.get("use_dynamic_shifting"):
        raise UserError(
            f"the scheduler config ({name}) shifts the noise levels by the image size (use_dynamic_shifting)",
            key="backbone.path",
            remedy="use a flow model with a constant shift",
        )
