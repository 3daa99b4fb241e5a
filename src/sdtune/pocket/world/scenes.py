"""The image world: one known object on a plain background, drawn from art, with everything about it known.

A :class:`Scene` says exactly what an image shows, so a caption, a mask and the truth for an evaluation all come from
the same record. Drawing is a pure function of the scene.
"""

from __future__ import annotations

import colorsys
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import numpy as np
from PIL import Image

from sdtune import streams
from sdtune.pocket.world.objects import BACKGROUNDS, BY_NAME, PLACES, SIZES, STYLES, TRAINED, Thing
from sdtune.randomness import generator

SIDE = 64
"""Pixels of an image's side."""

MAX_ANGLE = 10.0
_JITTER_SIZE = 2
_JITTER_PLACE = 0.15
_MARGIN = 2


@dataclass(frozen=True)
class Scene:
    """What one image shows.

    ``thing``, ``background``, ``size``, ``place`` and ``style`` are keys of the tables in
    :mod:`sdtune.pocket.world.objects`; ``side`` is the object's box in pixels, ``centre`` its middle in pixels (x, y),
    ``angle`` degrees counterclockwise.
    """

    thing: str
    background: str
    size: str
    place: str
    style: str = "fluent"
    side: int = 46
    centre: tuple[float, float] = (SIDE / 2, SIDE / 2)
    angle: float = 0.0
    mirror: bool = False


@cache
def art(thing: Thing, style: str) -> Image.Image:
    """The drawing of ``thing`` (RGBA, 96x96), recoloured where the thing is a recoloured member."""
    with as_file(files("sdtune.pocket") / "art" / style / f"{thing.art}.webp") as path:
        image = Image.open(path).convert("RGBA")
    if thing.recolour is None:
        return image
    rgba = np.asarray(image, dtype=np.float32) / 255
    hsv = np.apply_along_axis(lambda p: colorsys.rgb_to_hsv(*p), -1, rgba[..., :3])
    hsv[..., 0] = (hsv[..., 0] + thing.recolour.hue) % 1.0
    hsv[..., 1] = np.clip(hsv[..., 1] * thing.recolour.saturation, 0, 1)
    rgb = np.apply_along_axis(lambda p: colorsys.hsv_to_rgb(*p), -1, hsv)
    out = np.concatenate([rgb, rgba[..., 3:]], -1)
    return Image.fromarray((out * 255).round().astype(np.uint8), "RGBA")


def _placed(scene: Scene) -> Image.Image:
    """The object alone (RGBA, 64x64), transparent where the background shows."""
    drawing = art(BY_NAME[scene.thing], scene.style)
    if scene.mirror:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # One affine map from image to drawing (rotation, scale, place) instead of rotate + resize: one interpolation.
    # The drawing is first reduced to about the target's size, since bilinear sampling of a larger one would alias.
    drawing = drawing.resize((scene.side, scene.side), Image.Resampling.LANCZOS)
    # A transparent margin, so that art that touches its box is blended at the edge instead of cut in steps.
    canvas = Image.new("RGBA", (scene.side + 2 * _MARGIN, scene.side + 2 * _MARGIN))
    canvas.paste(drawing, (_MARGIN, _MARGIN))
    turn = np.deg2rad(scene.angle)
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    cx, cy = scene.centre
    half = canvas.width / 2
    matrix = (cos, -sin, half - cos * cx + sin * cy, sin, cos, half - sin * cx - cos * cy)
    return canvas.transform((SIDE, SIDE), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC)


def draw_scene(scene: Scene) -> Image.Image:
    """The image of ``scene``: RGB, 64x64."""
    image = Image.new("RGBA", (SIDE, SIDE), (*BACKGROUNDS[scene.background], 255))
    image.alpha_composite(_placed(scene))
    return image.convert("RGB")


def mask(scene: Scene) -> Image.Image:
    """The object's true mask: mode L, 64x64, 255 where the object covers the background."""
    return _placed(scene).getchannel("A").point(lambda a: 255 if a >= 128 else 0)


def held_out_combination(thing: str, background: str, size: str) -> bool:
    """Whether this combination is never drawn in training; a fifth of all, chosen by a hash so that it never moves."""
    return hashlib.sha256(f"{thing}/{background}/{size}".encode()).digest()[0] < 51


def place(scene_size: str, where: str, rng: np.random.Generator) -> tuple[int, tuple[float, float]]:
    """A box side and a centre in pixels for a size word and a place word, with the world's jitter."""
    side = SIZES[scene_size] + int(rng.integers(-_JITTER_SIZE, _JITTER_SIZE + 1))
    room = (SIDE - side) / 2
    dx, dy = PLACES[where]
    dx += float(rng.uniform(-_JITTER_PLACE, _JITTER_PLACE))
    dy += float(rng.uniform(-_JITTER_PLACE, _JITTER_PLACE))
    return side, (SIDE / 2 + dx * room, SIDE / 2 + dy * room)


def compose_scene(
    thing: str, background: str, size: str, where: str, rng: np.random.Generator, style: str = "fluent"
) -> Scene:
    """A scene with the given words and a random pose."""
    assert style in STYLES
    assert background in BACKGROUNDS
    assert where in PLACES
    side, centre = place(size, where, rng)
    angle = float(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
    return Scene(thing, background, size, where, style, side, centre, angle, bool(rng.integers(2)))


def training_scene(seed: int, index: int) -> Scene:
    """Image ``index`` of the training world: a trained thing in a combination that the evaluation does not use."""
    rng = generator(seed, streams.WORLD_SCENE, index)
    while True:
        thing = TRAINED[int(rng.integers(len(TRAINED)))].name
        background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
        size = list(SIZES)[int(rng.integers(len(SIZES)))]
        if not held_out_combination(thing, background, size):
            where = list(PLACES)[int(rng.integers(len(PLACES)))]
            return compose_scene(thing, background, size, where, rng)


def held_out_scenes(seed: int, count: int) -> list[Scene]:
    """``count`` scenes of trained things in combinations that training never draws, without repeating one early."""
    combinations = [
        (thing.name, background, size)
        for thing in TRAINED
        for background in BACKGROUNDS
        for size in SIZES
        if held_out_combination(thing.name, background, size)
    ]
    rng = generator(seed, streams.WORLD_HELD_OUT)
    scenes: list[Scene] = []
    while len(scenes) < count:
        for k in rng.permutation(len(combinations))[: count - len(scenes)]:
            thing, background, size = combinations[int(k)]
            scenes.append(compose_scene(thing, background, size, list(PLACES)[int(rng.integers(len(PLACES)))], rng))
    return scenes
