"""Control maps from a model: estimated once per image, cached by content, cropped like the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    GLPNConfig,
    GLPNForDepthEstimation,
    GLPNImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from drawings import save_drawings
from running import folder_data
from sdtune.data.control import estimated
from sdtune.data.control.estimated import Estimated
from sdtune.data.control.estimators import class_colors
from sdtune.errors import UserError

SIZES = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
SIZES |= {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    GLPNForDepthEstimation(GLPNConfig(**SIZES, decoder_hidden_size=16)).save_pretrained(folder / "depth")
    GLPNImageProcessor().save_pretrained(folder / "depth")
    SegformerForSemanticSegmentation(SegformerConfig(**SIZES, num_labels=5)).save_pretrained(folder / "segmentation")
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "segmentation")
    return {task: folder / task for task in ("depth", "segmentation")}


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_maps_are_estimated_once_and_cropped_with_their_image(
    task: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder_data(save_drawings(tmp_path / "images", 3, 96, 64), control=Estimated(str(models[task]), task))
    data.open(64, 4)
    data.control.prepare(data.train)
    full_maps = [data.control.map(s, (96, 64)) for s in data.train]
    assert len({m.tobytes() for m in full_maps}) > 1
    for sample, full in zip(data.train, full_maps, strict=True):
        assert full.shape == (64, 96, 3)
        assert np.array_equal(data.control.map(sample, (64, 64), (0.0, 0.5)), full[:, :64])
        assert np.array_equal(data.control.map(sample, (96, 64), flip=True), full[:, ::-1])
        if task == "depth":
            assert (full.min(), full.max()) == (0, 255)
        else:
            allowed = {tuple(c) for c in class_colors(np.arange(5)[None])[0].tolist()}
            assert {tuple(c) for c in full.reshape(-1, 3).tolist()} <= allowed

    def fail(*_: object) -> None:
        raise AssertionError("estimated again")

    monkeypatch.setattr(estimated, "Estimator", fail)
    cached = Estimated(str(models[task]), task)
    cached.prepare(data.train)
    assert np.array_equal(cached.map(data.train[0], (96, 64)), full_maps[0])
    monkeypatch.undo()
    pixels = data.train[0].pixels((96, 64), (0.5, 0.5), False)
    uncached = Estimated(str(models[task]), task)
    assert uncached.task == task
    assert np.array_equal(uncached.extract_maps([pixels], torch.device("cpu"))[0], full_maps[0])


def test_class_colors_are_those_of_pascal_voc() -> None:
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert [tuple(c) for c in class_colors(np.arange(5)[None])[0].tolist()] == expected
    assert tuple(class_colors(np.array([[9]]))[0, 0].tolist()) == (192, 0, 0)


def test_folder_without_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.control\.model: /nowhere is not a folder"):
        Estimated("/nowhere").open([])
    Estimated("somebody/model").open([])  # a model with a hub id is downloaded when training starts
    (tmp_path / "empty").mkdir()
    data = folder_data(save_drawings(tmp_path / "images", 1))
    data.open(32, 4)
    with pytest.raises(UserError, match=r"^data\.control\.model: .*/empty contains no model for depth"):
        Estimated(str(tmp_path / "empty")).prepare(data.train)
