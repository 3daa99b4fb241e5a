"""Pocket's maps say what the scene says, and the evaluation finds it again in true images alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sdtune.backbone import Facts, Pretrained
from sdtune.data import Folder
from sdtune.data.control.base import Control, Paired
from sdtune.data.control.edges import Canny, Scribble
from sdtune.errors import UserError
from sdtune.evaluation.agreement import iou, line_f1
from sdtune.evaluation.draw import base
from sdtune.pocket.evaluation import control as control_evaluation
from sdtune.pocket.evaluation.control import NEAR, ControlMetrics, box, expected_area, found, scores
from sdtune.pocket.world.control import (
    PocketControl,
    background_colour,
    depth,
    keypoints,
    object_colour,
    pose,
    segmentation,
)
from sdtune.pocket.world.data import SceneSample, World
from sdtune.pocket.world.objects import BACKGROUNDS, BY_NAME, THINGS
from sdtune.pocket.world.scenes import SIDE, Scene, draw_scene, held_out_scenes, mask
from sdtune.sampling.loop import Sampling

KINDS = ["segmentation", "depth", "pose"]
SCENES = held_out_scenes(0, 24)
CONTROLS: list[Control] = [Canny(), Scribble(), *(PocketControl(kind) for kind in KINDS)]


def name(control: Control) -> str:
    return getattr(control, "kind", type(control).__name__)


def inside(scene: Scene) -> np.ndarray:
    return np.asarray(mask(scene)) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_goes_with_crop_and_flip_of_its_image(kind: str) -> None:
    control = PocketControl(kind)
    sample = SceneSample(SCENES[0], "")
    whole = control.map(sample, (SIDE, SIDE))
    assert whole.shape == (SIDE, SIDE, 3)
    assert whole.dtype == np.uint8
    assert np.array_equal(control.map(sample, (SIDE, SIDE), flip=True), whole[:, ::-1])
    assert np.array_equal(control.map(sample, (48, SIDE), (0.25, 0.5)), whole[:, 4:52])
    assert np.array_equal(sample.pixels((48, SIDE), (0.25, 0.5), False), np.asarray(draw_scene(SCENES[0]))[:, 4:52])
    if kind != "depth":
        double = control.map(sample, (2 * SIDE, 2 * SIDE))
        assert np.array_equal(double[::2, ::2], whole)


def test_classes_have_colours_of_their_own() -> None:
    objects = {object_colour(thing.word) for thing in THINGS}
    backgrounds = {background_colour(background) for background in BACKGROUNDS}
    assert len(objects) == len({thing.word for thing in THINGS})
    assert len(backgrounds) == len(BACKGROUNDS)
    assert not objects & backgrounds


@pytest.mark.parametrize("scene", SCENES[:8], ids=str)
def test_a_segmentation_is_the_mask_in_the_colours_of_its_classes(scene: Scene) -> None:
    drawn = segmentation(scene)
    assert (drawn[inside(scene)] == object_colour(BY_NAME[scene.thing].word)).all()
    assert (drawn[~inside(scene)] == background_colour(scene.background)).all()


@pytest.mark.parametrize("scene", SCENES[:8], ids=str)
def test_a_depth_is_far_outside_and_nearest_deep_inside(scene: Scene) -> None:
    values = depth(scene)[..., 0]
    assert not values[~inside(scene)].any()
    assert values[inside(scene)].min() >= 110
    core = inside(scene)
    for _ in range(2):
        core = core & np.roll(core, 1, 0) & np.roll(core, -1, 0) & np.roll(core, 1, 1) & np.roll(core, -1, 1)
    if core.any():
        assert values[core].mean() > values[inside(scene) & ~core].mean()


def test_the_bigger_is_the_nearer() -> None:
    scene = replace(SCENES[0], centre=(32.0, 32.0))
    nearest = [int(depth(replace(scene, side=side)).max()) for side in (26, 34, 42, 48)]
    assert nearest == sorted(set(nearest))


def test_a_pose_turns_and_mirrors_with_its_object() -> None:
    upright = Scene("fox", "blue", "big", "in the middle", side=40, centre=(32.0, 32.0))
    points = keypoints(upright)
    assert points[0, -1] == pytest.approx((32, 12))
    assert points[1, 0] == pytest.approx((52, 32))
    assert keypoints(replace(upright, mirror=True))[1, 0] == pytest.approx((12, 32))
    # Counterclockwise: what was up leans to the left, what was right rises.
    turned = keypoints(replace(upright, angle=10.0))
    assert turned[0, -1][0] < 32
    assert turned[1, 0][1] < 32
    red = (pose(upright) == (255, 0, 0)).all(-1)
    assert np.nonzero(red)[1].min() > 32
    assert np.array_equal(np.nonzero((pose(replace(upright, mirror=True)) == (255, 0, 0)).all(-1))[1] < 32, red[red])


def test_a_turned_drawing_lies_where_its_pose_says() -> None:
    """Against the drawing itself: a bottle-shaped thing's long axis turns as the limbs do."""
    scene = Scene("carrot", "blue", "big", "in the middle", side=46, centre=(32.0, 32.0))

    def axis(one: Scene) -> float:
        rows, columns = np.nonzero(inside(one))
        covariance = np.cov(columns, rows)
        return float(np.rad2deg(0.5 * np.arctan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1])))

    def limb(one: Scene) -> float:
        x, y = keypoints(one)[1, 0]
        return float(np.rad2deg(np.arctan2(y - 32, x - 32)))

    for angle in (-10.0, 10.0):
        turned = replace(scene, angle=angle)
        assert axis(turned) - axis(scene) == pytest.approx(limb(turned) - limb(scene), abs=2)


def test_images_of_ones_own_are_refused(images: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.control: pocket's maps are of its own world"):
        Folder(path=str(images), control=PocketControl()).open(32, 4)


# --- the evaluation


@pytest.mark.parametrize("control", CONTROLS, ids=name)
def test_true_images_agree_with_their_own_map_and_not_with_anothers(control: Control) -> None:
    images = [np.asarray(draw_scene(scene)) for scene in SCENES]
    truth = [expected_area(SceneSample(scene, ""), control) for scene in SCENES]
    own, others = (float(np.mean(scores(images, t, control))) for t in (truth, truth[1:] + truth[:1]))
    assert own > 0.9
    assert others < 0.5
    blank = np.full((SIDE, SIDE, 3), 90, np.uint8)
    assert not found(blank, control).any()


def test_agreements_by_hand() -> None:
    one, other, nothing = (np.zeros((16, 16), bool) for _ in range(3))
    one[4, 2:12], other[6, 2:12] = True, True
    assert line_f1(one, other, NEAR) == 1  # two pixels apart
    assert line_f1(one, np.roll(other, 1, 0), NEAR) == 0
    assert line_f1(one, nothing, NEAR) == iou(one, nothing) == 0
    assert line_f1(nothing, nothing, NEAR) == iou(nothing, nothing) == 1
    half = one.copy()
    half[4, 7:] = False
    assert line_f1(half, one, NEAR) == pytest.approx(2 * 0.7 / 1.7)  # recall 7 of 10, precision 1
    assert iou(half, one) == 0.5
    area = np.zeros((32, 32), bool)
    area[4:20, 10:26] = True
    assert np.abs(np.argwhere(box(area)).min(0) - (4, 10)).max() <= 1
    assert iou(box(area), area) > 0.85


def few(**settings: object) -> ControlMetrics:
    return ControlMetrics(images=3, sampling=Sampling(steps=1, guidance=1.0), **settings)


def data(control: Control | None) -> World:
    world = World(images=3, control=control)
    world.open(SIDE, 4)
    return world


def test_the_figures_are_those_of_base_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_evaluation, "trained", lambda source, artifact, name, device: base(source, device))
    figures = few().run(Pretrained(), data(PocketControl("pose")), tmp_path, "net", torch.device("cpu"), tmp_path)
    keys = ["control_agreement", "control_agreement_shuffled", "background_accuracy", "object_accuracy"]
    assert set(figures) == {*keys, *(f"base_{key}" for key in keys), "ceiling_control_agreement"}
    assert all(0 <= value <= 1 for value in figures.values())
    assert all(figures[key] == figures[f"base_{key}"] for key in keys)
    assert figures["ceiling_control_agreement"] > 0.8
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["base_images.png", "trained_images.png"]


def test_a_control_that_has_no_map_of_those_scenes_gives_null_and_says_why(tmp_path: Path) -> None:
    world = data(None)
    world.control = Paired(str(tmp_path))
    figures = few().run(Pretrained(), world, tmp_path, "net", torch.device("cpu"), tmp_path)
    reasons = figures.pop("reasons")
    assert set(figures.values()) == {None}
    assert set(reasons) == set(figures)
    assert "Paired has no map" in reasons["control_agreement"]


def test_other_data_is_refused(images: Path) -> None:
    facts = Facts(SIDE, 4, 4, "epsilon", 32)
    few().check(data(Canny()), facts)
    with pytest.raises(UserError, match=r"^evaluation: pocket_control compares images with control maps"):
        few().check(data(None), facts)
    own = Folder(path=str(images), control=Canny())
    own.open(32, 4)
    with pytest.raises(UserError, match=r"evaluation=clip"):
        few().check(own, facts)
    with pytest.raises(UserError, match="64x64"):
        few().check(data(Canny()), Facts(512, 8, 4, "epsilon", 77))
