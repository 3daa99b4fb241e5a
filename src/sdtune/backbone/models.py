"""Models of a pipeline, built from their configs: class, tensor names and shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sdtune.backbone.families import family_of_folder
from sdtune.backbone.foreign import unreadable_as_user_error
from sdtune.backbone.locate import read_config
from sdtune.formats.keys import canonical_key, is_redundant


def model_class(component: str, folder: Path) -> Any:
    """Class of ``component`` of the pipeline ``folder`` in diffusers or transformers."""
    return family_of_folder(folder, "backbone.path").model_classes()[component]


def from_config(component: str, folder: Path) -> Any:
    """Build ``component`` of the pipeline ``folder`` with random weights."""
    component_class = model_class(component, folder)
    if component.startswith("text_encoder"):
        return component_class(component_class.config_class.from_pretrained(folder / component))
    return component_class.from_config(component_class.load_config(folder / component))


def model_shapes(component: str, folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Expected shape of each tensor of ``component``, by canonical key; computed on the meta device."""
    config = read_config(folder / component / "config.json")
    return _shapes(component, json.dumps(config), str(folder))


@lru_cache(maxsize=8)
def _shapes(component: str, config: str, folder: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"), unreadable_as_user_error(Path(folder) / component / "config.json", "backbone.path"):
        model = from_config(component, Path(folder))
    tensors = model.state_dict()
    return {canonical_key(component, key): tuple(t.shape) for key, t in tensors.items() if not is_redundant(key)}
