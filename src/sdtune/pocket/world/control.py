"""Exact control maps of pocket's images, generated from scenes."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from PIL import Image, ImageDraw

from sdtune.data.control.base import Control, Resample, fit
from sdtune.data.samples import Sample
from sdtune.errors import UserError
from sdtune.pocket.world.data import SceneSample
from sdtune.pocket.world.objects import BACKGROUNDS, BY_NAME, THINGS
from sdtune.pocket.world.scenes import SIDE, Scene, mask

Kind = Literal["segmentation", "depth", "pose"]

_WORDS = sorted({thing.word for thing in THINGS})
_SMALLEST, _BIGGEST = 26, 48  # side of an object's box in pixels, including jitter
_NEAR, _RANGE, _RELIEF = 110, 90, 55
# Direction of each limb (right, down) in units of half the box's side, and its RGB color.
_LIMBS = {(0, -1): (0, 255, 0), (0, 1): (0, 0, 255), (1, 0): (255, 0, 0), (-1, 0): (255, 255, 0)}
_JOINT = (255, 255, 255)


class PocketControl(Control):
    """Control maps of scenes of pocket's world, 64x64 pixels.

    ``segmentation``: :func:`segmentation`; ``depth``: :func:`depth`; ``pose``: :func:`pose`.
    """

    def __init__(self, kind: Kind = "segmentation") -> None:
        self.kind = kind

    def open(self, samples: Sequence[Sample]) -> None:
        other_sample = next((s for s in samples if not isinstance(s, SceneSample)), None)
        if other_sample is not None:
            raise UserError(
                "pocket's control maps need data of pocket's world, such as data=pocket_world",
                key="data.control",
                remedy="set data/control=canny, scribble, paired or estimated for other images",
            )

    def unmirrored_map(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        assert isinstance(sample, SceneSample)
        resample: Resample = "bilinear" if self.kind == "depth" else "nearest"
        return fit(Image.fromarray(draw_map(sample.scene, self.kind)), size, offset, resample)


def draw_map(scene: Scene, kind: Kind) -> np.ndarray:
    """Control map of ``scene``, uint8 [64, 64, 3]."""
    return {"segmentation": segmentation, "depth": depth, "pose": pose}[kind](scene)


def object_colour(word: str) -> tuple[int, int, int]:
    """RGB color of a class: evenly spaced hues, two alternating saturations, full brightness."""
    index = _WORDS.index(word)
    red, green, blue = colorsys.hsv_to_rgb(index / len(_WORDS), 1.0 if index % 2 else 0.55, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def background_colour(name: str) -> tuple[int, int, int]:
    """RGB color of a background at half brightness, which no object class has."""
    red, green, blue = BACKGROUNDS[name]
    return red // 2, green // 2, blue // 2


def segmentation(scene: Scene) -> np.ndarray:
    """Segmentation map, uint8 [64, 64, 3]: the object in its class color on the background's color."""
    inside = np.asarray(mask(scene)) > 0
    colours = np.array([background_colour(scene.background), object_colour(BY_NAME[scene.thing].word)], dtype=np.uint8)
    out: np.ndarray = colours[inside.astype(int)]
    return out


def depth(scene: Scene) -> np.ndarray:
    """Depth map, uint8 [64, 64, 3]: gray level by nearness; the background is 0, the farthest.

    The object's outline has a level from 110 (smallest) to 200 (largest object). Inside, the level rises by up to 55
    like a hemisphere, as a function of the distance to the outline relative to its maximum.
    """
    inside = (np.asarray(mask(scene)) > 0).astype(np.uint8)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    relative_distance = distance / max(float(distance.max()), 1.0)
    size = np.clip((scene.side - _SMALLEST) / (_BIGGEST - _SMALLEST), 0, 1)
    near = _NEAR + _RANGE * size + _RELIEF * np.sqrt(1 - (1 - relative_distance) ** 2)
    return np.repeat((near * inside).round().astype(np.uint8)[..., None], 3, axis=2)


def keypoints(scene: Scene) -> dict[tuple[int, int], tuple[float, float]]:
    """Midpoints of the sides of the object's box in pixels (x, y), keyed by direction (right, down) in the drawing.

    ``(0, -1)`` is the top, rotated with the object; ``(1, 0)`` is the drawing's right side, which is on the left if the
    object is mirrored.
    """
    angle, half = np.deg2rad(scene.angle), scene.side / 2
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    points = {}
    for right, down in _LIMBS:
        x, y = half * (-right if scene.mirror else right), half * down
        points[right, down] = (scene.centre[0] + cos * x + sin * y, scene.centre[1] - sin * x + cos * y)
    return points


def pose(scene: Scene) -> np.ndarray:
    """Pose map, uint8 [64, 64, 3]: lines on black from the object's center to the midpoints of its box's sides.

    Up is green, down is blue, the drawing's right is red and its left is yellow. The map shows center, size, angle and
    mirroring, but not the shape.
    """
    image = Image.new("RGB", (SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    for limb, point in keypoints(scene).items():
        pen.line((*scene.centre, *point), fill=_LIMBS[limb], width=3)
    x, y = scene.centre
    pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_JOINT)
    return np.array(image)
