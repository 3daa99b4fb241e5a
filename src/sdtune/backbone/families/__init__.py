"""Model families (SD 1.x, SD 2.x, SDXL, SD 3): one object for each, and their detection from configs and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtune.backbone.families.base import (
    STATED_PREDICTION,
    Component,
    Facts,
    Family,
    FamilyName,
    Quantization,
    model_spec_prediction,
)
from sdtune.backbone.families.sd1 import SD1
from sdtune.backbone.families.sd2 import SD2
from sdtune.backbone.families.sd3 import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD3Family
from sdtune.backbone.families.sdxl import SDXL
from sdtune.backbone.families.unet import UNetFamily, check_unet_file
from sdtune.errors import UserError
from sdtune.files import read_json

FAMILIES: dict[FamilyName, Family] = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
"""Families that ``backbone.family`` accepts."""

SD3_FAMILIES = (SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE)

POCKET_GUIDANCE = 3.0
"""Default guidance scale of pocket, the backbone included in sdtune, as in ``conf/backbone``."""


def family_by(unet: Mapping[str, Any], two_encoders: bool) -> FamilyName:
    """Family of a model with this UNet config and one or two text encoders."""
    # The transformer blocks of SD 2.x have linear projections, those of SD 1.x have convolutions.
    family: FamilyName = "sd2" if unet.get("use_linear_projection") else "sd1"
    return "sdxl" if two_encoders else family


def family_of_folder(folder: Path, key: str) -> Family:
    """Family of the pipeline ``folder``, from its configs.

    Args:
        folder: pipeline folder in the diffusers layout.
        key: config key of the folder, for error messages.

    Raises:
        UserError: the config of the denoiser is missing, unreadable or of no family.
    """
    if (folder / "transformer").is_dir():
        transformer = read_json(folder / "transformer" / "config.json", key)
        family = next((family for family in SD3_FAMILIES if family.has_config(transformer)), None)
        if family is None:
            raise UserError(
                f"{folder / 'transformer' / 'config.json'} has dual_attention_layers without qk_norm",
                key=key,
                remedy="use SD 3 medium, SD 3.5 medium or SD 3.5 large",
            )
        return family
    unet = read_json(folder / "unet" / "config.json", key)
    return FAMILIES[family_by(unet, two_encoders=(folder / "text_encoder_2").is_dir())]


def family_of_file(shapes: Mapping[str, Sequence[int]], families: Iterable[Family]) -> Family:
    """Family of a single file from its tensor names, as :meth:`Family.usual_names` returns them, and shapes.

    Raises:
        UserError: it is not a Stable Diffusion checkpoint that sdtune can train; the message states what it is.
    """
    family = next((family for family in families if family.is_in(shapes)), None)
    if family is None or isinstance(family, UNetFamily):
        check_unet_file(shapes)
    if family is None:
        raise UserError("contains a UNet without its text encoder", remedy="use a full checkpoint")
    return family


__all__ = [
    "FAMILIES",
    "POCKET_GUIDANCE",
    "SD1",
    "SD2",
    "SD3_FAMILIES",
    "SD3_MEDIUM",
    "SD35_LARGE",
    "SD35_MEDIUM",
    "SDXL",
    "STATED_PREDICTION",
    "Component",
    "Facts",
    "Family",
    "FamilyName",
    "Quantization",
    "SD3Family",
    "UNetFamily",
    "family_by",
    "family_of_file",
    "family_of_folder",
    "model_spec_prediction",
]
