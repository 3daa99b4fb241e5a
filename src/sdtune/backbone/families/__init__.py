"""Model families (SD 1.x, SD 2.x, SDXL, SD 3): one object for each, and their detection from configs and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtune.backbone.families.base import (
    STATED_PREDICTION,
    T5,
    Component,
    Facts,
    Family,
    FamilyName,
    LoRAProjection,
    LoRATarget,
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

SD3_FAMILIES = (SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE)

FAMILIES: dict[FamilyName, Family] = {family.name: family for family in (SD1, SD2, SDXL, *SD3_FAMILIES)}
"""All families, by name."""

POCKET_GUIDANCE = 3.0
"""Default guidance scale of pocket, the backbone included in sdtune, as in ``conf/backbone``."""


def family_of_configs(index: Mapping[str, Any], denoiser: Mapping[str, Any], where: str) -> Family:
    """Find the family of a pipeline from ``model_index.json`` and the config of its denoiser.

    Args:
        where: the config file of the denoiser, for errors.

    Raises:
        UserError: the denoiser is of no family.
    """
    if _has(index, "transformer"):
        family = next((family for family in SD3_FAMILIES if family.has_config(denoiser)), None)
        if family is None:
            raise UserError(
                f"{where} is the config of a {denoiser.get('_class_name')} that sdtune cannot train",
                key="backbone.path",
                remedy="use SD 3 medium, SD 3.5 medium or SD 3.5 large",
            )
        return family
    if _has(index, "text_encoder_2"):
        return SDXL
    # The transformer blocks of SD 2.x have linear projections, those of SD 1.x have convolutions.
    return SD2 if denoiser.get("use_linear_projection") else SD1


def _has(index: Mapping[str, Any], component: str) -> bool:
    return bool((index.get(component) or [None])[0])


def denoiser_folder(index: Mapping[str, Any]) -> str:
    """Folder of the denoiser of a pipeline with this index."""
    return "transformer" if _has(index, "transformer") else "unet"


def family_of_folder(folder: Path, key: str) -> Family:
    """Family of the pipeline ``folder``, from its configs.

    Args:
        folder: pipeline folder in the diffusers layout.
        key: config key of the folder, for error messages.

    Raises:
        UserError: a config is missing, unreadable or of no family.
    """
    index = read_json(folder / "model_index.json", key)
    file = folder / denoiser_folder(index) / "config.json"
    return family_of_configs(index, read_json(file, key), str(file))


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
    "T5",
    "Component",
    "Facts",
    "Family",
    "FamilyName",
    "LoRAProjection",
    "LoRATarget",
    "Quantization",
    "SD3Family",
    "UNetFamily",
    "denoiser_folder",
    "family_of_configs",
    "family_of_file",
    "family_of_folder",
    "model_spec_prediction",
]
