"""The frozen weights of a finished training serve as the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from running import adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.new_tokens import NewToken
from sdtune.data.control.edges import Canny
from sdtune.methods import ControlNet, DreamBooth, LoRA, TextualInversion
from sdtune.training.release import release_backbone

TOKEN = NewToken("<my_cat>", "cat")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (LoRA, {"rank": 2, "targets": ["cross_attention", "convolutions", "text_encoder"], "new_tokens": [TOKEN]}),
        (TextualInversion, {"new_tokens": [TOKEN]}),
        (ControlNet, {}),
    ],
)
def test_released_backbone_equals_the_loaded_one(
    method: Any, settings: dict[str, Any], tiny: Path, images: Path
) -> None:
    source = Pretrained(str(tiny))
    adapter = method(backbone=source, optimizer=adamw(1e-2), **settings)
    templates = ["a <my_cat>, {}"] if "new_tokens" in settings else None
    fit(adapter, folder_data(images, templates=templates, control=Canny() if method is ControlNet else None), 2)
    released, loaded = release_backbone(adapter), source.load()
    assert released is not None
    assert not hasattr(adapter, "backbone")
    state, expected = released.state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert not any(module.training for module in released.modules())
    prompt = ["a <my_cat> on grass"]
    loaded.prepare_for_device(torch.device("cpu"))
    assert torch.equal(released.encode_text(prompt).states, loaded.encode_text(prompt).states)


def test_trained_backbone_is_not_released(tiny: Path, images: Path) -> None:
    adapter = DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3))
    fit(adapter, folder_data(images, class_prompt="a dog", class_images=2), 1)
    assert release_backbone(adapter) is None
