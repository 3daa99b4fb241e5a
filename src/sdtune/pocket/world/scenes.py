"""Scenes of pocket's world: one object on a plain background, rendered from emoji art, with full ground truth.

A :class:`Scene` describes an image completely: its caption, its mask and the ground truth for evaluations are derived
from it. Rendering is a pure function of the scene.
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
"""Width and height of an image in pixels."""

MAX_ANGLE = 10.0
_JITTER_SIZE = 2
_JITTER_PLACE = 0.15
_MARGIN = 2


@dataclass(frozen=True)
class Scene:
    """Complete description of one image.

    ``thing``, ``background``, ``size``, ``place`` and ``style`` are keys of the tables in
    :mod:`sdtune.pocket.world.objects`. ``side`` is the side of the object's box in pixels, ``centre`` its center in
    pixels (x, y), ``angle`` its rotation in degrees counterclockwise.
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
    """Drawing of ``thing`` (RGBA, 96x96), with its color change applied."""
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


def _render_object(scene: Scene) -> Image.Image:
    """Object without background (RGBA, 64x64), transparent outside the object."""
    drawing = art(BY_NAME[scene.thing], scene.style)
    if scene.mirror:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Rotate and translate in one affine transform, so that pixels are interpolated only once. Resize the drawing to the
    # target size first, because sampling a larger drawing would cause aliasing.
    drawing = drawing.resize((scene.side, scene.side), Image.Resampling.LANCZOS)
    # The transparent margin anti-aliases the edges of art that touches its box.
    canvas = Image.new("RGBA", (scene.side + 2 * _MARGIN, scene.side + 2 * _MARGIN))
    canvas.paste(drawing, (_MARGIN, _MARGIN))
    angle = np.deg2rad(scene.angle)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    cx, cy = scene.centre
    half = canvas.width / 2
    matrix = (cos, -sin, half - cos * cx + sin * cy, sin, cos, half - sin * cx - cos * cy)
    return canvas.transform((SIDE, SIDE), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC)


def draw_scene(scene: Scene) -> Image.Image:
    """Image of ``scene``: RGB, 64x64."""
    image = Image.new("RGBA", (SIDE, SIDE), (*BACKGROUNDS[scene.background], 255))
    image.alpha_composite(_render_object(scene))
    return image.convert("RGB")


def mask(scene: Scene) -> Image.Image:
    """True mask of the object: mode L, 64x64, 255 inside the object."""
    return _render_object(scene).getchannel("A").point(lambda a: 255 if a >= 128 else 0)


def held_out_combination(thing: str, background: str, size: str) -> bool:
    """Whether training never shows this combination: a fifth of all combinations, selected by a stable hash."""
    return hashlib.sha256(f"{thing}/{background}/{size}".encode()).digest()[0] < 51


def place(scene_size: str, where: str, rng: np.random.Generator) -> tuple[int, tuple[float, float]]:
    """Side and center of the object's box in pixels, with random jitter, for a size word and a place word."""
    side = SIZES[scene_size] + int(rng.integers(-_JITTER_SIZE, _JITTER_SIZE + 1))
    room = (SIDE - side) / 2
    dx, dy = PLACES[where]
    dx += float(rng.uniform(-_JITTER_PLACE, _JITTER_PLACE))
    dy += float(rng.uniform(-_JITTER_PLACE, _JITTER_PLACE))
    return side, (SIDE / 2 + dx * room, SIDE / 2 + dy * room)


def compose_scene(
    thing: str, background: str, size: str, where: str, rng: np.random.Generator, style: str = "fluent"
) -> Scene:
    """Scene with the given words and a random box, angle and mirroring."""
    assert style in STYLES
    assert background in BACKGROUNDS
    assert where in PLACES
    side, centre = place(size, where, rng)
    angle = float(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
    return Scene(thing, background, size, where, style, side, centre, angle, bool(rng.integers(2)))


def training_scene(seed: int, index: int) -> Scene:
    """Training scene ``index``: a trained object in a combination that is not held out."""
    rng = generator(seed, streams.WORLD_SCENE, index)
    while True:
        thing = TRAINED[int(rng.integers(len(TRAINED)))].name
        background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
        size = list(SIZES)[int(rng.integers(len(SIZES)))]
        if not held_out_combination(thing, background, size):
            where = list(PLACES)[int(rng.integers(len(PLACES)))]
            return compose_scene(thing, background, size, where, rng)


def held_out_scenes(seed: int, count: int) -> list[Scene]:
    """``count`` scenes of trained objects in held-out combinations; repeats one only after all others were used."""
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
