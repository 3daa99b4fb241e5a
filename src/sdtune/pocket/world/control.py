"""Control maps of the image world, exact, generated from scenes."""

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
_SMALLEST, _BIGGEST = 26, 48  # sides of an object's box, jitter included
_NEAR, _RANGE, _RELIEF = 110, 90, 55
# Limbs of the skeleton, as shares of half the box's side to the right and down, and their colours.
_LIMBS = {(0, -1): (0, 255, 0), (0, 1): (0, 0, 255), (1, 0): (255, 0, 0), (-1, 0): (255, 255, 0)}
_JOINT = (255, 255, 255)


class PocketControl(Control):
    """Maps of scenes of pocket's world, on their 64x64 pixels.

    ``segmentation``: :func:`segmentation`; ``depth``: :func:`depth`; ``pose``: :func:`pose`.
    """

    def __init__(self, kind: Kind = "segmentation") -> None:
        self.kind = kind

    def open(self, samples: Sequence[Sample]) -> None:
        odd = next((s for s in samples if not isinstance(s, SceneSample)), None)
        if odd is not None:
            raise UserError(
                "pocket's maps are of its own world (data=pocket_world); for one's own images choose"
                " data/control=canny, scribble, paired or estimated",
                key="data.control",
            )

    def crop(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        assert isinstance(sample, SceneSample)
        resample: Resample = "bilinear" if self.kind == "depth" else "nearest"
        return fit(Image.fromarray(draw_map(sample.scene, self.kind)), size, offset, resample)


def draw_map(scene: Scene, kind: Kind) -> np.ndarray:
    """uint8 [64, 64, 3]."""
    return {"segmentation": segmentation, "depth": depth, "pose": pose}[kind](scene)


def object_colour(word: str) -> tuple[int, int, int]:
    """The class's colour: hues around the circle, two saturations, full brightness."""
    place = _WORDS.index(word)
    red, green, blue = colorsys.hsv_to_rgb(place / len(_WORDS), 1.0 if place % 2 else 0.55, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def background_colour(name: str) -> tuple[int, int, int]:
    """The background's own colour at half its brightness, so that none is an object's."""
    red, green, blue = BACKGROUNDS[name]
    return red // 2, green // 2, blue // 2


def segmentation(scene: Scene) -> np.ndarray:
    """The object's mask in its class word's colour, on the background's: uint8 [64, 64, 3]."""
    inside = np.asarray(mask(scene)) > 0
    colours = np.array([background_colour(scene.background), object_colour(BY_NAME[scene.thing].word)], dtype=np.uint8)
    out: np.ndarray = colours[inside.astype(int)]
    return out


def depth(scene: Scene) -> np.ndarray:
    """Nearness in grey, uint8 [64, 64, 3]: the background is 0, as far as can be.

    An object's rim lies the nearer the bigger it is, 110 to 200; from there it bulges towards the viewer as a
    hemisphere would, by up to 55, with the distance to the rim as a share of its greatest.
    """
    inside = (np.asarray(mask(scene)) > 0).astype(np.uint8)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    share = distance / max(float(distance.max()), 1.0)
    size = np.clip((scene.side - _SMALLEST) / (_BIGGEST - _SMALLEST), 0, 1)
    near = _NEAR + _RANGE * size + _RELIEF * np.sqrt(1 - (1 - share) ** 2)
    return np.repeat((near * inside).round().astype(np.uint8)[..., None], 3, axis=2)


def keypoints(scene: Scene) -> dict[tuple[int, int], tuple[float, float]]:
    """Middles of the object's box's sides in pixels (x, y), by (right, down) as the object itself has them.

    ``(0, -1)`` is up, turned with the object; ``(1, 0)`` the drawing's right side, which a mirrored object has on the
    left.
    """
    turn, half = np.deg2rad(scene.angle), scene.side / 2
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    points = {}
    for right, down in _LIMBS:
        x, y = half * (-right if scene.mirror else right), half * down
        points[right, down] = (scene.centre[0] + cos * x + sin * y, scene.centre[1] - sin * x + cos * y)
    return points


def pose(scene: Scene) -> np.ndarray:
    """A skeleton on black, uint8 [64, 64, 3]: limbs from the object's centre to the middles of its box's sides.

    Up is green, down blue, the drawing's right red and its left yellow; so centre, size, angle and mirroring can be
    read from it, and nothing of the shape.
    """
    image = Image.new("RGB", (SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    for limb, point in keypoints(scene).items():
        pen.line((*scene.centre, *point), fill=_LIMBS[limb], width=3)
    x, y = scene.centre
    pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_JOINT)
    return np.array(image)
