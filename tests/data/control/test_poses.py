"""Poses by a model: skeletons in OpenPose's colours, people found by a detector, left and right under a mirror."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)
from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil

from drawings import save_drawings
from running import folder_data
from sdtune.data.control import poses
from sdtune.data.control.estimated import Estimated
from sdtune.data.control.poses import PoseEstimator, other_side, skeletons
from sdtune.errors import UserError


def person() -> np.ndarray:
    """Facing the viewer, 512 pixels tall: its right is on the image's left. Its left ankle is not seen."""
    points = {
        "nose": (256, 60),
        "left_eye": (270, 50),
        "right_eye": (242, 50),
        "left_ear": (290, 55),
        "right_ear": (222, 55),
        "left_shoulder": (320, 130),
        "right_shoulder": (192, 130),
        "left_elbow": (370, 200),
        "right_elbow": (142, 200),
        "left_wrist": (390, 280),
        "right_wrist": (122, 280),
        "left_hip": (290, 290),
        "right_hip": (222, 290),
        "left_knee": (290, 390),
        "right_knee": (222, 390),
        "left_ankle": (290, 480),
        "right_ankle": (222, 480),
    }
    out = np.array([(*xy, 0.9) for xy in points.values()])
    out[15, 2] = 0.1
    return out


def test_points_and_limbs_have_openposes_colours() -> None:
    image = skeletons([person()], (512, 512))
    joints = {
        (60, 256): (255, 0, 0),  # nose
        (130, 256): (255, 85, 0),  # neck, between the shoulders
        (130, 192): (255, 170, 0),  # right shoulder
        (130, 320): (85, 255, 0),  # left shoulder
        (390, 222): (0, 255, 255),  # right knee
        (55, 290): (255, 0, 85),  # left ear
    }
    for (y, x), colour in joints.items():
        assert tuple(image[y, x].tolist()) == pytest.approx(colour, abs=1), (y, x)
    assert tuple(image[130, 224].tolist()) == (153, 0, 0)  # neck to right shoulder, at 0.6
    assert tuple(image[340, 222].tolist()) == (0, 153, 51)  # right hip to knee
    assert image[100, 256].any()  # neck to nose
    assert not image[435, 290].any(), "the left ankle is not seen, so no limb leads there"
    assert image[435, 222].any()
    assert not image[0].any()


def test_a_mirrored_person_has_its_sides_changed_over() -> None:
    mirrored = person()
    mirrored[:, 0] = 511 - mirrored[:, 0]
    true = skeletons([other_side(mirrored)], (512, 512))
    made = skeletons([other_side(person())], (512, 512))[:, ::-1]
    # A pixel more or less by rounding; the colours of arms are apart by more.
    assert (np.abs(true.astype(int) - made).max(axis=2) > 60).mean() < 0.002
    wrong = skeletons([person()], (512, 512))[:, ::-1]
    assert (np.abs(true.astype(int) - wrong).max(axis=2) > 60).mean() > 0.005


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights; ``several`` is a ViTPose++, with a head a dataset."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    for name, experts, keypoints in (("one", 1, 17), ("several", 3, 17), ("hands", 1, 21)):
        backbone = VitPoseBackboneConfig(
            **sizes, num_experts=experts, part_features=8, image_size=(64, 48), patch_size=(16, 16)
        )
        config = VitPoseConfig(backbone_config=backbone, num_labels=keypoints)
        VitPoseForPoseEstimation(config).save_pretrained(folder / name)
        VitPoseImageProcessorPil(size={"height": 64, "width": 48}).save_pretrained(folder / name)
    for name, label in (("detector", "person"), ("cats", "cat")):
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = YolosConfig(**vision, image_size=[32, 32], patch_size=8, num_detection_tokens=4, num_labels=2)
        config.id2label = {0: "car", 1: label}
        YolosForObjectDetection(config).save_pretrained(folder / name)
        YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("model", ["one", "several"])
def test_maps_are_estimated_once_and_mirrored_with_their_image(
    model: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poses, "SEEN", 0.0)  # a random model is sure of nothing
    control = Estimated(str(models[model]), "pose")
    data = folder_data(save_drawings(tmp_path / "images", 2, 96, 64), control=control)
    data.open(64, 4)
    control.prepare(data.train)
    sample = data.train[0]
    whole = control.map(sample, (96, 64))
    assert whole.shape == (64, 96, 3)
    assert whole.any()
    assert np.array_equal(control.map(sample, (64, 64), (0.0, 0.5)), whole[:, :64])
    mirrored = control.map(sample, (96, 64), flip=True)
    assert mirrored.any()
    assert not np.array_equal(mirrored, whole[:, ::-1]), "left and right have not changed over"


def test_people_are_where_the_detector_finds_them(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = PoseEstimator(models["one"], models["detector"], torch.device("cpu"))
    image = np.full((64, 96, 3), 90, np.uint8)

    def detect(outputs: object, threshold: float, target_sizes: list[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
        assert (threshold, target_sizes) == (0.5, [(64, 96)])
        boxes = torch.tensor([[10.0, 4.0, 30.0, 60.0], [40.0, 0.0, 90.0, 60.0], [0.0, 0.0, 5.0, 5.0]])
        return [{"boxes": boxes, "labels": torch.tensor([1, 1, 0]), "scores": torch.ones(3)}]

    monkeypatch.setattr(estimator.finder, "post_process_object_detection", detect)
    people = estimator.people(Image.fromarray(image))
    assert [p.shape for p in people] == [(17, 3), (17, 3)]
    # ViTPose looks at more than the box, at the aspect of its input; its points lie therein.
    for points, (left, right) in zip(people, ((10, 30), (40, 90)), strict=True):
        assert (points[:, 0] > left - 45).all()
        assert (points[:, 0] < right + 45).all()
    monkeypatch.setattr(
        estimator.finder,
        "post_process_object_detection",
        lambda *_, **__: [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}],
    )
    assert not estimator(image)[0].any(), "nobody is there"


def test_what_finds_no_people_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"^data\.control\.model: .* finds 21 keypoints; COCO's 17 are needed"):
        PoseEstimator(models["hands"], None, cpu)
    with pytest.raises(UserError, match=r"^data\.control\.model: .*/detector holds no model for poses"):
        PoseEstimator(models["detector"], None, cpu)
    with pytest.raises(UserError, match=r"^data\.control\.detector: .*/cats has no label 'person'"):
        PoseEstimator(models["one"], models["cats"], cpu)
    with pytest.raises(UserError, match=r"^data\.control\.detector: .*/one holds no model for object detection"):
        PoseEstimator(models["one"], models["one"], cpu)
    with pytest.raises(UserError, match=r"^data\.control\.detector: depth needs none"):
        Estimated("somebody/model", "depth", "somebody/detector")
    with pytest.raises(UserError, match=r"^data\.control\.detector: /nowhere is not a folder"):
        Estimated(str(models["one"]), "pose", "/nowhere").open([])
