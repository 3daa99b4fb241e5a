"""Noise schedule of the forward diffusion process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdtune.errors import UserError

_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")


def betas(config: Mapping[str, Any]) -> Tensor:
    """Variances beta_t of a diffusers scheduler config, float64 [T].

    ``linear``: Ho et al. 2020 (section 4); ``scaled_linear``: Rombach et al. 2022 (linear in the square root);
    ``squaredcos_cap_v2``: Nichol & Dhariwal 2021 (eq. 17). A ``trained_betas`` list overrides all three.

    Raises:
        UserError: the config has another ``beta_schedule``.
    """
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float64)
    missing = next((key for key in _BETAS if config.get(key) is None), None)
    if missing is not None:
        raise UserError(
            f"{missing} is missing in the scheduler config",
            key="backbone.path",
            remedy=f"add {', '.join(_BETAS)} to it",
        )
    steps, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    kind = config["beta_schedule"]
    if kind == "linear":
        return torch.linspace(first, last, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        edges = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return torch.from_numpy(np.minimum(1 - edges[1:] / edges[:-1], 0.999))
    raise UserError(
        f"unknown beta_schedule {kind!r} in the scheduler config",
        key="backbone.path",
        remedy="supported: linear, scaled_linear, squaredcos_cap_v2",
    )


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Rescale alpha-bar [T] to a last value of 0, with its first value unchanged (Lin et al. 2024, algorithm 1)."""
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()


class NoiseSchedule:
    """Noise schedule over T timesteps: z_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise (Ho et al. 2020, eq. 4).

    Args:
        alphas_cumprod: alpha-bar, float64 [T], decreasing, in [0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod
        # Compute the square roots in float64; values are cast to the dtype of the latents when they are used.
        self._alpha = alphas_cumprod.sqrt()
        self._sigma = (1 - alphas_cumprod).sqrt()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Create a schedule from a diffusers scheduler config; ``rescale_betas_zero_snr``: the last step is pure noise.

        Raises:
            UserError: the beta schedule is unknown, or ``rescale_betas_zero_snr`` is used with epsilon-prediction: at
                pure noise, predicted noise does not determine the sample.
        """
        alphas_cumprod = torch.cumprod(1 - betas(config), 0)
        if not config.get("rescale_betas_zero_snr"):
            return cls(alphas_cumprod)
        if config.get("prediction_type", "epsilon") == "epsilon":
            raise UserError(
                "not supported with epsilon-prediction, which cannot recover the sample from pure noise",
                key="backbone.zero_terminal_snr",
                remedy="set backbone.prediction_type=v_prediction too",
            )
        return cls(rescale_zero_terminal_snr(alphas_cumprod))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def _at(self, values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
        selected = values.to(device=timesteps.device)[timesteps].to(like.dtype)
        return selected.reshape(-1, *[1] * (like.dim() - 1))

    def alpha(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """sqrt(abar_t) for ``timesteps`` [B], in the dtype of ``like`` [B, ...] and broadcastable to its shape."""
        return self._at(self._alpha, timesteps, like)

    def sigma(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """sqrt(1 - abar_t) for ``timesteps`` [B], in the dtype of ``like`` [B, ...] and broadcastable to its shape."""
        return self._at(self._sigma, timesteps, like)

    def to(self, device: torch.device) -> NoiseSchedule:
        """Move the tables to ``device`` in place, so that a step does not copy them; returns ``self``."""
        if self._alpha.device != device:
            # MPS devices do not support float64.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._alpha, self._sigma = self._alpha.to(device, dtype), self._sigma.to(device, dtype)
            self.alphas_cumprod = self.alphas_cumprod.to(device, dtype)
        return self

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents z_t [B, ...] from ``clean`` and ``noise`` [B, ...] at ``timesteps`` [B]."""
        return self.alpha(timesteps, clean) * clean + self.sigma(timesteps, clean) * noise

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio abar_t / (1 - abar_t), float32 [B] (Kingma et al. 2021, eq. 1)."""
        abar = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return (abar / (1 - abar)).float()
