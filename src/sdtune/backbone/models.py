"""Models of a pipeline, built from their configs: class, tensor names and shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdtune.backbone.foreign import unreadable_as_user_error
from sdtune.backbone.locate import read_config
from sdtune.formats.keys import canonical_key

MODEL_CLASSES: dict[str, Any] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
}


def from_config(component: str, folder: Path) -> Any:
    """Build ``component`` of the pipeline ``folder`` with random weights."""
    model_class = MODEL_CLASSES[component]
    if component.startswith("text_encoder"):
        return model_class(CLIPTextConfig.from_pretrained(folder / component))
    return model_class.from_config(model_class.load_config(folder / component))


def model_shapes(component: str, folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Expected shape of each tensor of ``component``, by canonical key; computed on the meta device."""
    config = read_config(folder / component / "config.json")
    return _shapes(component, json.dumps(config), str(folder))


@lru_cache(maxsize=8)
def _shapes(component: str, config: str, folder: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"), unreadable_as_user_error(Path(folder) / component / "config.json", "backbone.path"):
        model = from_config(component, Path(folder))
    return {canonical_key(component, key): tuple(value.shape) for key, value in model.state_dict().items()}
