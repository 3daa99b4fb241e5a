"""Control agreement on hand-made maps, and as a metric of a ControlNet run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from drawings import save_drawings
from running import folder_data
from sdtune.backbone import Pretrained
from sdtune.data.control.base import FromImage
from sdtune.data.control.edges import Canny
from sdtune.data.control.paired import Paired
from sdtune.evaluation import ClipMetrics
from sdtune.evaluation.agreement import agreement, mean_iou
from sdtune.sampling.loop import Request, Sampling
from sdtune.sampling.run_models import RunModels

CPU = torch.device("cpu")


def lines(row: int) -> np.ndarray:
    image = np.zeros((600, 800, 3), np.uint8)
    image[row, 100:200] = 255
    return image


@pytest.mark.parametrize("task", ["edges", "pose"])
def test_lines_match_within_a_fraction_of_the_diagonal(task: str) -> None:
    requested = lines(300)
    assert agreement(task, requested, lines(307)) == 1  # 0.0075 of 1000 pixels are 7.5
    assert agreement(task, requested, lines(308)) == 0
    assert agreement(task, requested, requested * 0) == 0


def test_segmentation_agreement_is_the_mean_iou_over_classes() -> None:
    requested = np.zeros((10, 10, 3), np.uint8)
    requested[:5] = (128, 0, 0)
    extracted = np.zeros((10, 10, 3), np.uint8)
    extracted[:5] = (0, 0, 128)  # another class than red
    assert agreement("segmentation", requested, requested) == 1
    assert agreement("segmentation", requested, extracted) == pytest.approx(1 / 3)  # black agrees; red and blue do not
    assert mean_iou(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]])) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_depth_agreement_is_one_minus_the_rmse() -> None:
    requested = np.zeros((4, 4, 3), np.uint8)
    extracted = requested.copy()
    extracted[:2] = 255
    assert agreement("depth", requested, requested) == 1
    assert agreement("depth", requested, extracted) == pytest.approx(1 - 0.5**0.5)


class UpperHalfControl(FromImage):
    """Control whose map of any image has a white upper half."""

    task = "segmentation"

    def unmirrored_map(self, sample: object, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        control_map: np.ndarray = np.zeros((size[1], size[0], 3), np.uint8)
        control_map[: size[1] // 2] = 255
        return control_map

    def extract_maps(self, images: Sequence[np.ndarray], device: torch.device) -> list[np.ndarray]:
        return [p.copy() for p in images]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_drawings(tmp_path / "images", 3, 64, 64)


def test_control_agreement_is_measured_without_a_clip(
    images: Path, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = UpperHalfControl()
    data = folder_data(images, control=control)
    data.open(64, 4)

    def draw(_: object, requests: Sequence[Request], __: Sampling) -> list[np.ndarray]:
        return [r.conditions.get("control", np.zeros((64, 64, 3), np.uint8)) for r in requests]

    monkeypatch.setattr(RunModels, "trained_images", draw)
    monkeypatch.setattr(RunModels, "base_images", draw)
    (tmp_path / "artifact").mkdir()
    evaluation = ClipMetrics(images=4, sampling=Sampling(steps=1, width=64, height=64))
    metrics = evaluation.run(RunModels(Pretrained(str(tiny)), tmp_path / "artifact", "lora", CPU), data, tmp_path)
    assert metrics["control_agreement"] == 1
    assert metrics["base_control_agreement"] == 0.25  # all black: half of one class, none of the other
    assert metrics["clip_image"] is None
    assert "control_agreement" not in metrics["reasons"]


def test_missing_control_agreement_has_a_reason(images: Path, tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(images, tmp_path / "maps")
    for control, reason in ((None, "no control maps"), (Paired(str(tmp_path / "maps")), "not extracted from images")):
        data = folder_data(images, control=control)
        data.open(32, 4)
        metrics = ClipMetrics().run(RunModels(Pretrained(str(tiny)), tmp_path, "lora", CPU), data, tmp_path)
        assert metrics["control_agreement"] is None
        assert reason in metrics["reasons"]["control_agreement"]


def test_edges_are_extracted_with_the_settings_of_the_control() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    extracted = Canny(low=20, high=40).extract_maps([image], CPU)
    assert np.array_equal(extracted[0], Canny(low=20, high=40).extract(image))
    assert Canny().task == "edges"
