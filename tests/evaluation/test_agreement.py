"""What an image shows against what its map asked for, by hand, and as metrics of a ControlNet's run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from drawings import save_drawings
from running import folder_data
from sdtune.backbone import Pretrained
from sdtune.data.control.base import FromImage, Paired
from sdtune.data.control.edges import Canny
from sdtune.evaluation import ClipMetrics
from sdtune.evaluation import subject_metrics as general
from sdtune.evaluation.agreement import agreement, mean_iou
from sdtune.sampling.loop import Request, Sampling

CPU = torch.device("cpu")


def lines(row: int) -> np.ndarray:
    image = np.zeros((600, 800, 3), np.uint8)
    image[row, 100:200] = 255
    return image


@pytest.mark.parametrize("task", ["edges", "pose"])
def test_lines_match_within_a_share_of_the_diagonal(task: str) -> None:
    asked = lines(300)
    assert agreement(task, asked, lines(307)) == 1  # 0.0075 of 1000 pixels are 7.5
    assert agreement(task, asked, lines(308)) == 0
    assert agreement(task, asked, asked * 0) == 0


def test_areas_by_the_mean_iou_over_their_classes() -> None:
    asked = np.zeros((10, 10, 3), np.uint8)
    asked[:5] = (128, 0, 0)
    shown = np.zeros((10, 10, 3), np.uint8)
    shown[:5] = (0, 0, 128)  # another class, and not the same as red
    assert agreement("segmentation", asked, asked) == 1
    assert agreement("segmentation", asked, shown) == pytest.approx(1 / 3)  # black agrees, red and blue do not
    assert mean_iou(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]])) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_depth_by_its_error() -> None:
    asked = np.zeros((4, 4, 3), np.uint8)
    shown = asked.copy()
    shown[:2] = 255
    assert agreement("depth", asked, asked) == 1
    assert agreement("depth", asked, shown) == pytest.approx(1 - 0.5**0.5)


class Halves(FromImage):
    """The map of whatever image: its upper half white."""

    task = "segmentation"

    def crop(self, sample: object, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        made: np.ndarray = np.zeros((size[1], size[0], 3), np.uint8)
        made[: size[1] // 2] = 255
        return made

    def again(self, images: Sequence[np.ndarray], device: torch.device) -> list[np.ndarray]:
        return [p.copy() for p in images]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_drawings(tmp_path / "images", 3, 64, 64)


def test_agreement_is_measured_without_a_clip(
    images: Path, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Halves()
    data = folder_data(images, control=control)
    data.open(64, 4)

    def draw(_: object, requests: Sequence[Request], __: Sampling) -> list[np.ndarray]:
        return [r.maps[0] if r.maps else np.zeros((64, 64, 3), np.uint8) for r in requests]

    monkeypatch.setattr(general, "draw_images", draw)
    monkeypatch.setattr(general, "draw_base", lambda _, requests, sampling, __: draw(None, requests, sampling))
    (tmp_path / "artifact").mkdir()
    few = ClipMetrics(images=4, sampling=Sampling(steps=1, width=64, height=64))
    figures = few.run(Pretrained(str(tiny)), data, tmp_path / "artifact", "lora", CPU, tmp_path)
    assert figures["control_agreement"] == 1
    assert figures["base_control_agreement"] == 0.25  # all black: half of one class, none of the other
    assert figures["clip_image"] is None
    assert "control_agreement" not in figures["reasons"]


def test_maps_that_no_image_gives_say_so(images: Path, tmp_path: Path, tiny: Path) -> None:
    for control, reason in ((None, "no control maps"), (Paired(str(images)), "not made from images")):
        data = folder_data(images, control=control)
        data.open(32, 4)
        figures = ClipMetrics().run(Pretrained(str(tiny)), data, tmp_path, "lora", CPU, tmp_path)
        assert figures["control_agreement"] is None
        assert reason in figures["reasons"]["control_agreement"]


def test_edges_are_found_again_with_the_detectors_own_settings() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = Canny(low=20, high=40).again([image], CPU)
    assert np.array_equal(found[0], Canny(low=20, high=40).extract(image))
    assert Canny().task == "edges"
