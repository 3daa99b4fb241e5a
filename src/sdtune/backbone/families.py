"""Model families (SD 1.x, SD 2.x, SDXL): detection from configs, sizes and default guidance scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sdtune.errors import check_multiple
from sdtune.formats.original import Family

Component = Literal["denoiser", "vae", "text_encoder"]
"""Components that a method may train; ``text_encoder`` means both text encoders of SDXL."""

Quantization = Literal["fp8", "int8", "nf4"]
"""Formats of quantized weights (:mod:`sdtune.backbone.quantization`)."""


@dataclass(frozen=True)
class Facts:
    """Properties of a backbone that are known before its weights are read.

    Attributes:
        side: native resolution of the denoiser, in pixels.
        factor: downscaling factor of the VAE: pixels per latent cell in each direction.
        max_tokens: maximum number of tokens of a prompt, including the start and end token.
        windows: number of windows of the text encoder that a prompt may fill (75 tokens each for CLIP).
        scheduler: diffusers class of the scheduler config; empty if the config names none.
        train_timesteps: number of timesteps of the noise schedule.
        min_steps: minimum number of sampling steps with PNDM: 4 for its Runge-Kutta steps (Liu et al. 2022), 1 with
            ``skip_prk_steps`` or with zero terminal SNR, for which DDIM is used instead.
    """

    side: int
    factor: int
    latent_channels: int
    prediction_type: str
    max_tokens: int
    family: Family = "sd1"
    windows: int = 1
    scheduler: str = "DDIMScheduler"
    train_timesteps: int = 1000
    min_steps: int = 1

    def check_side(self, side: int, key: str) -> None:
        """Raise UserError if the VAE cannot encode or decode an image with this ``side`` in pixels; ``key`` sets it."""
        check_multiple(side, self.factor, key)


STATED_PREDICTION = "_prediction_type_of_file"
"""Key in the scheduler config of a converted single file that states its own prediction type; diffusers ignores keys
that begin with an underscore."""


FAMILIES: dict[Family, tuple[str, str]] = {
    "sd1": ("SD 1.x", "backbone=sd15"),
    "sd2": ("SD 2.x", "backbone=sd21"),
    "sdxl": ("SDXL", "backbone=sdxl"),
}
"""Display name and ``backbone`` option of each family."""


GUIDANCE: dict[Family, float] = {"sd1": 7.5, "sd2": 7.5, "sdxl": 5.0}
"""Default guidance scale of each family, as in ``conf/backbone``."""

POCKET_GUIDANCE = 3.0
"""Default guidance scale of pocket, the backbone included in sdtune, as in ``conf/backbone``."""


def family_by(unet: Mapping[str, Any], two_encoders: bool) -> Family:
    """Family of a model with this UNet config and one or two text encoders."""
    # The transformer blocks of SD 2.x have linear projections, those of SD 1.x have convolutions.
    family: Family = "sd2" if unet.get("use_linear_projection") else "sd1"
    return "sdxl" if two_encoders else family
