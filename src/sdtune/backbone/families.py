"""Model families (SD 1.x, 2.x, SDXL, pocket) and their sizes, recognised from configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sdtune.formats.original import Family

Component = Literal["unet", "vae", "text_encoder"]
"""What a method may open; ``text_encoder`` stands for both of SDXL's."""


@dataclass(frozen=True)
class Facts:
    """What is known of a backbone before any weights are read.

    ``factor``: pixels a latent cell; ``side``: the resolution that the UNet was made for, in pixels;
    ``max_tokens``: of a prompt, its start and end included; ``windows``: how many times the text encoder's length a
    prompt may have.
    """

    side: int
    factor: int
    latent_channels: int
    prediction_type: str
    max_tokens: int
    family: Family = "sd1"
    windows: int = 1


FAMILIES: dict[Family, tuple[str, str]] = {
    "sd1": ("SD 1.x", "backbone=sd15"),
    "sd2": ("SD 2.x", "backbone=sd21"),
    "sdxl": ("SDXL", "backbone=sdxl"),
}
"""How each is called, and the config that is for it."""


GUIDANCE: dict[Family, float] = {"sd1": 7.5, "sd2": 7.5, "sdxl": 5.0}
"""The guidance scale that ``conf/backbone`` gives each."""

POCKET_GUIDANCE = 3.0
"""And that which it gives the backbone that ships with sdtune."""


def family_by(unet: Mapping[str, Any], two_encoders: bool) -> Family:
    """Which Stable Diffusion has a UNet of this config, and so many text encoders."""
    # 2.x came with linear projections around its transformers, and 1.x with convolutions.
    single: Family = "sd2" if unet.get("use_linear_projection") else "sd1"
    return "sdxl" if two_encoders else single
