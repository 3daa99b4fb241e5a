"""Human poses estimated with transformers, drawn as OpenPose skeletons."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from sdtune.data.control.estimators import load_estimator
from sdtune.errors import UserError

MIN_KEYPOINT_SCORE = 0.3
"""Minimum score of a keypoint to be drawn."""

MIN_PERSON_SCORE = 0.5
"""Minimum score of a detected person."""

_NECK = -1
_NOSE, _LEFT_SHOULDER, _RIGHT_SHOULDER = 0, 5, 6
# COCO index of each of OpenPose's 18 keypoints; the neck is the midpoint of the shoulders.
_OPENPOSE = (_NOSE, _NECK, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10)),
    *((1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
_SWAPPED_SIDES = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)


def swap_sides(person: np.ndarray) -> np.ndarray:
    """Swap the left and right keypoints of ``person`` [17, 3], as in a mirrored image."""
    return person[list(_SWAPPED_SIDES)]


def skeletons(people: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Draw skeletons on black: uint8 [H, W, 3] of ``size`` (width, height).

    Points, limbs and colors are those of OpenPose with 18 keypoints (Cao et al. 2019): the hues of consecutive points
    are 20 degrees apart, and limbs have 0.6 of the brightness. A limb is 8 pixels wide in an image of 512 pixels.

    Args:
        people: COCO's 17 keypoints of each person, [17, 3]: x and y in pixels, and the score.
    """
    width, height = size
    image = np.zeros((height, width, 3), dtype=np.uint8)
    half = max(1, round(4 * min(size) / 512))
    for person in people:
        points = [_point(person, index) for index in _OPENPOSE]
        for number, limb in enumerate(_LIMBS):
            ends = [points[index] for index in limb]
            if all(end is not None for end in ends):
                _draw_limb(image, np.array(ends, dtype=float), half, _color(number, 0.6))
        for number, point in enumerate(points):
            if point is not None:
                cv2.circle(image, (round(point[0]), round(point[1])), half, _color(number, 1.0), thickness=-1)
    return image


def _point(person: np.ndarray, index: int) -> tuple[float, float] | None:
    if index == _NECK:
        shoulders = person[[_LEFT_SHOULDER, _RIGHT_SHOULDER]]
        (x, y), score = shoulders[:, :2].mean(axis=0), shoulders[:, 2].min()
    else:
        x, y, score = person[index]
    return (float(x), float(y)) if score >= MIN_KEYPOINT_SCORE else None


def _draw_limb(image: np.ndarray, ends: np.ndarray, half: int, color: tuple[int, int, int]) -> None:
    direction = ends[1] - ends[0]
    center = tuple(ends.mean(axis=0).round().astype(int).tolist())
    axes = (max(1, round(float(np.linalg.norm(direction)) / 2)), half)
    cv2.ellipse(
        image, center, axes, float(np.degrees(np.arctan2(direction[1], direction[0]))), 0, 360, color, thickness=-1
    )


def _color(number: int, brightness: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number / len(_OPENPOSE), 1.0, 1.0)
    return tuple(int(brightness * 255 * part) for part in (red, green, blue))  # type: ignore[return-value]


class PoseEstimator:
    """Pose estimator: ViTPose (Xu et al. 2022), optionally with a detector of people.

    Args:
        model: folder with a ``VitPoseForPoseEstimation`` for COCO's 17 keypoints.
        detector: folder with an object detection model with the label ``person``; None: each image shows one person.
        device: device of both models.
    """

    def __init__(self, model: Path, detector: Path | None, device: torch.device) -> None:
        from transformers import AutoModelForObjectDetection, VitPoseForPoseEstimation

        self.device, self.detector = device, None
        self.processor, self.model = load_estimator("model", model, "poses", VitPoseForPoseEstimation, device)
        if self.model.config.num_labels != len(_SWAPPED_SIDES):
            raise UserError(
                f"{model} has {self.model.config.num_labels} keypoints",
                key="data.control.model",
                remedy="set a model with COCO's 17 keypoints",
            )
        if detector is None:
            return
        self.detector_processor, self.detector = load_estimator(
            "detector", detector, "object detection", AutoModelForObjectDetection, device
        )
        if "person" not in self.detector.config.id2label.values():
            raise UserError(
                f"{detector} has no label 'person'",
                key="data.control.detector",
                remedy="set a detector that was trained on COCO",
            )

    @torch.no_grad()
    def people(self, image: Image.Image) -> list[np.ndarray]:
        """Estimate the keypoints of each person, [17, 3]: x and y in pixels, and the score."""
        boxes = self._boxes(image)
        if not boxes:
            return []
        inputs = self.processor(images=image, boxes=[boxes], return_tensors="pt").to(self.device)
        expert_count = self.model.config.backbone_config.num_experts
        # ViTPose++ has one expert per training data set in its mixture-of-experts layers; the first is that of COCO.
        expert_arguments = (
            {"dataset_index": torch.zeros(len(boxes), dtype=torch.long, device=self.device)} if expert_count > 1 else {}
        )
        [poses] = self.processor.post_process_pose_estimation(self.model(**inputs, **expert_arguments), boxes=[boxes])
        return [np.concatenate([p["keypoints"].numpy(), p["scores"].numpy()[:, None]], axis=1) for p in poses]

    def _boxes(self, image: Image.Image) -> list[list[float]]:
        """Boxes of the people in ``image``: left, top, width and height in pixels."""
        if self.detector is None:
            return [[0.0, 0.0, float(image.width), float(image.height)]]
        outputs = self.detector(**self.detector_processor(images=image, return_tensors="pt").to(self.device))
        [detections] = self.detector_processor.post_process_object_detection(
            outputs, threshold=MIN_PERSON_SCORE, target_sizes=[(image.height, image.width)]
        )
        names = self.detector.config.id2label
        corners = [
            box
            for box, label in zip(detections["boxes"].tolist(), detections["labels"].tolist(), strict=True)
            if names[label] == "person"
        ]
        return [[left, top, right - left, bottom - top] for left, top, right, bottom in corners]

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw the pose map of an image, and the map with left and right swapped; all are uint8 [H, W, 3]."""
        image = Image.fromarray(pixels)
        people = self.people(image)
        return skeletons(people, image.size), skeletons([swap_sides(p) for p in people], image.size)
