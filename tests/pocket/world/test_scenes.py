"""Scenes of pocket's world: deterministic renders, true masks, held-out combinations and subjects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdtune.pocket.evaluation.classifier import background
from sdtune.pocket.world.captions import full_caption, training_caption
from sdtune.pocket.world.objects import BACKGROUNDS, HELD_OUT, PLACES, SIZES, STYLES, THINGS, TRAINED, Thing
from sdtune.pocket.world.scenes import (
    SIDE,
    Scene,
    art,
    compose_scene,
    draw_scene,
    held_out_combination,
    held_out_scenes,
    mask,
    training_scene,
)
from sdtune.randomness import generator


def _scenes() -> list[Scene]:
    """Scenes with every background, size and place, and with objects, styles and poses in turn."""
    rng = generator(7, "test/world")
    words = [(colour, size, where) for colour in BACKGROUNDS for size in SIZES for where in PLACES]
    return [
        compose_scene(THINGS[k % len(THINGS)].name, colour, size, where, rng, STYLES[k % 2])
        for k, (colour, size, where) in enumerate(words)
    ]


def known_members(word: str) -> list[Thing]:
    """Training objects with the class word ``word``."""
    return [thing for thing in TRAINED if thing.word == word]


def test_world_has_enough_objects_classes_and_backgrounds() -> None:
    assert len({thing.name for thing in THINGS}) == len(THINGS)
    assert len(TRAINED) >= 96
    assert sum(len(known_members(word)) >= 4 for word in {thing.word for thing in THINGS}) >= 10
    assert len(HELD_OUT) >= 8
    assert len(BACKGROUNDS) == 12
    assert list(SIZES) == ["big", "small"]


def test_held_out_subject_is_an_unseen_object_of_a_known_class() -> None:
    for thing in HELD_OUT:
        known = known_members(thing.word)
        assert len(known) >= 4, thing
        assert thing.art not in {other.art for other in known}, thing


@pytest.mark.parametrize("style", STYLES)
def test_every_object_has_a_distinct_drawing_in_every_style(style: str) -> None:
    drawings = [art(thing, style) for thing in THINGS]
    assert all(drawing.mode == "RGBA" and drawing.size == (96, 96) for drawing in drawings)
    assert len({drawing.tobytes() for drawing in drawings}) == len(THINGS)


def test_drawings_differ_between_styles() -> None:
    assert all(art(thing, "fluent").tobytes() != art(thing, "noto").tobytes() for thing in THINGS)


def test_render_is_a_pure_function_of_the_scene() -> None:
    for scene in _scenes()[::7]:
        first = draw_scene(scene)
        assert first.size == (SIDE, SIDE)
        assert first.mode == "RGB"
        assert draw_scene(replace(scene)).tobytes() == first.tobytes()


def test_mask_covers_exactly_the_object() -> None:
    for scene in _scenes():
        image = np.asarray(draw_scene(scene)).astype(int)
        covered = np.asarray(mask(scene)) == 255
        assert covered.mean() > 0.03
        # Outside the mask, a pixel is background or an edge pixel that is at least about half background.
        other_background = np.asarray(
            draw_scene(replace(scene, background="black" if scene.background == "white" else "white"))
        )
        change = np.abs(image - other_background).sum(-1)
        change = change / change.max()
        assert (change[~covered] > 0.45).all()
        assert (change[covered] < 0.55).all()


def test_object_has_the_size_and_place_of_its_scene() -> None:
    for scene in _scenes():
        ys, xs = np.nonzero(np.asarray(mask(scene)))
        extent = max(np.ptp(xs), np.ptp(ys)) + 1
        assert (extent > 36) == (scene.size == "big"), (scene, extent)
        x, y = (xs.min() + xs.max() + 1) / 2 - SIDE / 2, (ys.min() + ys.max() + 1) / 2 - SIDE / 2
        dx, dy = PLACES[scene.place]
        assert x * dx + y * dy > 0 or (dx, dy) == (0.0, 0.0)


def test_training_scenes_have_no_held_out_combination_object_or_style() -> None:
    trained = {thing.name for thing in TRAINED}
    for index in range(4_000):
        scene = training_scene(0, index)
        assert scene.thing in trained
        assert scene.style == "fluent"
        assert not held_out_combination(scene.thing, scene.background, scene.size)


def test_training_scenes_are_a_function_of_seed_and_index() -> None:
    assert training_scene(0, 5) == training_scene(0, 5)
    assert training_scene(0, 5) not in (training_scene(0, 6), training_scene(1, 5))


def test_held_out_scenes_use_every_combination_before_repeating_one() -> None:
    combinations = {
        (thing.name, colour, size)
        for thing in TRAINED
        for colour in BACKGROUNDS
        for size in SIZES
        if held_out_combination(thing.name, colour, size)
    }
    scenes = held_out_scenes(0, len(combinations) + 40)
    shown = [(scene.thing, scene.background, scene.size) for scene in scenes]
    assert set(shown[: len(combinations)]) == combinations
    assert len(shown) == len(combinations) + 40
    assert set(shown) == combinations


def test_held_out_scenes_are_a_function_of_the_seed() -> None:
    assert held_out_scenes(0, 64) == held_out_scenes(0, 64) != held_out_scenes(1, 64)


@pytest.mark.parametrize(
    ("thing", "colour", "size", "noun", "caption"),
    [
        ("fox", "blue", "big", None, "a big fox on a blue background, on the left"),
        ("owl", "orange", "small", None, "a small owl on an orange background, on the left"),
        ("cherries", "red", "big", None, "big cherries on a red background, on the left"),
        ("poodle", "red", "big", "sks dog", "a big sks dog on a red background, on the left"),
    ],
)
def test_full_caption_has_the_expected_text(thing: str, colour: str, size: str, noun: str | None, caption: str) -> None:
    assert full_caption(Scene(thing, colour, size, "on the left"), noun) == caption


def test_training_captions_name_object_or_class_and_no_wrong_detail() -> None:
    scene = Scene("taxi", "teal", "small", "at the top")
    rng = generator(0, "test/captions")
    captions = [training_caption(scene, rng) for _ in range(300)]
    for word in ("taxi", "car", "teal", "small", "at the top", "a photo of"):
        fraction = sum(word in caption for caption in captions) / len(captions)
        assert 0.1 < fraction < 1, word
    assert all("taxi" in caption or "car" in caption for caption in captions)
    wrong_words = {"big", *BACKGROUNDS} - {"teal"}
    assert not any(wrong_words & set(caption.split()) for caption in captions)


def test_background_is_classified_exactly_for_every_render() -> None:
    scenes = _scenes()
    images = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    assert {(scene.background, scene.size) for scene in scenes} == {(c, s) for c in BACKGROUNDS for s in SIZES}
    assert background(images) == [scene.background for scene in scenes]
