"""Poses from a model: skeletons in OpenPose's colors, people found by a detector, left and right in mirrored images."""

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
from sdtune.data.control import estimated, poses
from sdtune.data.control.estimated import Estimated
from sdtune.data.control.poses import PoseEstimator, skeletons, swap_sides
from sdtune.errors import UserError


def person() -> np.ndarray:
    """Keypoints of a person who faces the viewer, in a 512 pixel image; the left ankle has a low score."""
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


def test_points_and_limbs_have_the_colors_of_openpose() -> None:
    image = skeletons([person()], (512, 512))
    joints = {
        (60, 256): (255, 0, 0),  # nose
        (130, 256): (255, 85, 0),  # neck, between the shoulders
        (130, 192): (255, 170, 0),  # right shoulder
        (130, 320): (85, 255, 0),  # left shoulder
        (390, 222): (0, 255, 255),  # right knee
        (55, 290): (255, 0, 85),  # left ear
    }
    for (y, x), color in joints.items():
        assert tuple(image[y, x].tolist()) == pytest.approx(color, abs=1), (y, x)
    assert tuple(image[130, 224].tolist()) == (153, 0, 0)  # neck to right shoulder, at 0.6
    assert tuple(image[340, 222].tolist()) == (0, 153, 51)  # right hip to knee
    assert image[100, 256].any()  # neck to nose
    assert not image[435, 290].any(), "no limb may lead to the left ankle, whose score is too low"
    assert image[435, 222].any()
    assert not image[0].any()


def test_mirrored_person_has_left_and_right_swapped() -> None:
    mirrored = person()
    mirrored[:, 0] = 511 - mirrored[:, 0]
    expected = skeletons([swap_sides(mirrored)], (512, 512)).astype(int)
    swapped = skeletons([swap_sides(person())], (512, 512))[:, ::-1]
    # Rounding shifts single pixels; swapped arm colors affect more pixels.
    assert (np.abs(expected - swapped).max(axis=2) > 60).mean() < 0.002
    unswapped = skeletons([person()], (512, 512))[:, ::-1]
    assert (np.abs(expected - unswapped).max(axis=2) > 60).mean() > 0.005


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights; ``several`` is a ViTPose++, with one head per training data set."""
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
    monkeypatch.setattr(poses, "MIN_KEYPOINT_SCORE", 0.0)  # the scores of a random model are low
    control = Estimated(str(models[model]), "pose")
    data = folder_data(save_drawings(tmp_path / "images", 2, 96, 64), control=control)
    data.open(64, 4)
    control.prepare(data.train)
    sample = data.train[0]
    full_map = control.map(sample, (96, 64))
    assert full_map.shape == (64, 96, 3)
    assert full_map.any()
    assert np.array_equal(control.map(sample, (64, 64), (0.0, 0.5)), full_map[:, :64])
    mirrored = control.map(sample, (96, 64), flip=True)
    assert mirrored.any()
    assert not np.array_equal(mirrored, full_map[:, ::-1]), "left and right have not been swapped"


def test_people_are_where_the_detector_finds_them(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = PoseEstimator(models["one"], models["detector"], torch.device("cpu"))
    image = np.full((64, 96, 3), 90, np.uint8)

    def detect(outputs: object, threshold: float, target_sizes: list[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
        assert (threshold, target_sizes) == (0.5, [(64, 96)])
        boxes = torch.tensor([[10.0, 4.0, 30.0, 60.0], [40.0, 0.0, 90.0, 60.0], [0.0, 0.0, 5.0, 5.0]])
        return [{"boxes": boxes, "labels": torch.tensor([1, 1, 0]), "scores": torch.ones(3)}]

    monkeypatch.setattr(estimator.detector_processor, "post_process_object_detection", detect)
    people = estimator.people(Image.fromarray(image))
    assert [p.shape for p in people] == [(17, 3), (17, 3)]
    # ViTPose crops the image to the box, extended to the aspect ratio of its input; its points are in this crop.
    for points, (left, right) in zip(people, ((10, 30), (40, 90)), strict=True):
        assert (points[:, 0] > left - 45).all()
        assert (points[:, 0] < right + 45).all()
    monkeypatch.setattr(
        estimator.detector_processor,
        "post_process_object_detection",
        lambda *_, **__: [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}],
    )
    assert not estimator(image)[0].any(), "the map must be black without people"


def test_unsuitable_pose_model_or_detector_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"^data\.control\.model: .* has 21 keypoints; set a model with COCO's 17"):
        PoseEstimator(models["hands"], None, cpu)
    with pytest.raises(UserError, match=r"^data\.control\.model: .*/detector contains no model for poses"):
        PoseEstimator(models["detector"], None, cpu)
    with pytest.raises(UserError, match=r"^data\.control\.detector: .*/cats has no label 'person'"):
        PoseEstimator(models["one"], models["cats"], cpu)
    with pytest.raises(UserError, match=r"^data\.control\.detector: .*/one contains no model for object detection"):
        PoseEstimator(models["one"], models["one"], cpu)
    with pytest.raises(UserError, match=r"^data\.control\.detector: task=depth uses no detector"):
        Estimated("somebody/model", "depth", "somebody/detector")
    with pytest.raises(UserError, match=r"^data\.control\.detector: /nowhere is not a folder"):
        Estimated(str(models["one"]), "pose", "/nowhere").open([])


def test_poses_without_scipy_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimated.importlib.util, "find_spec", lambda name: None)
    message = r"^data\.control\.task: ViTPose of transformers needs scipy; install it: pip install scipy$"
    with pytest.raises(UserError, match=message):
        Estimated("some/model", task="pose").open([])
