"""Pocket's control maps match their scenes; the control evaluation scores only true images high."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sdtune.backbone import Facts, Pretrained
from sdtune.backbone.families import SD1
from sdtune.data import Folder
from sdtune.data.control.base import Control
from sdtune.data.control.edges import Canny, Scribble
from sdtune.data.control.paired import Paired
from sdtune.errors import UserError
from sdtune.evaluation.agreement import iou, line_f1
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
from sdtune.sampling.run_models import RunModels

KINDS = ["segmentation", "depth", "pose"]
SCENES = held_out_scenes(0, 24)
CONTROLS: list[Control] = [Canny(), Scribble(), *(PocketControl(kind) for kind in KINDS)]


def name(control: Control) -> str:
    return getattr(control, "kind", type(control).__name__)


def inside(scene: Scene) -> np.ndarray:
    return np.asarray(mask(scene)) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_map_is_cropped_and_flipped_like_its_image(kind: str) -> None:
    control = PocketControl(kind)
    sample = SceneSample(SCENES[0], "")
    full_map = control.map(sample, (SIDE, SIDE))
    assert full_map.shape == (SIDE, SIDE, 3)
    assert full_map.dtype == np.uint8
    assert np.array_equal(control.map(sample, (SIDE, SIDE), flip=True), full_map[:, ::-1])
    assert np.array_equal(control.map(sample, (48, SIDE), (0.25, 0.5)), full_map[:, 4:52])
    assert np.array_equal(sample.pixels((48, SIDE), (0.25, 0.5), False), np.asarray(draw_scene(SCENES[0]))[:, 4:52])
    if kind != "depth":
        double = control.map(sample, (2 * SIDE, 2 * SIDE))
        assert np.array_equal(double[::2, ::2], full_map)


def test_classes_and_backgrounds_have_distinct_colors() -> None:
    objects = {object_colour(thing.word) for thing in THINGS}
    backgrounds = {background_colour(background) for background in BACKGROUNDS}
    assert len(objects) == len({thing.word for thing in THINGS})
    assert len(backgrounds) == len(BACKGROUNDS)
    assert not objects & backgrounds


@pytest.mark.parametrize("scene", SCENES[:8], ids=str)
def test_segmentation_map_is_the_mask_in_class_colors(scene: Scene) -> None:
    segmentation_map = segmentation(scene)
    assert (segmentation_map[inside(scene)] == object_colour(BY_NAME[scene.thing].word)).all()
    assert (segmentation_map[~inside(scene)] == background_colour(scene.background)).all()


@pytest.mark.parametrize("scene", SCENES[:8], ids=str)
def test_depth_map_is_far_outside_and_nearest_at_the_core(scene: Scene) -> None:
    values = depth(scene)[..., 0]
    assert not values[~inside(scene)].any()
    assert values[inside(scene)].min() >= 110
    core = inside(scene)
    for _ in range(2):
        core = core & np.roll(core, 1, 0) & np.roll(core, -1, 0) & np.roll(core, 1, 1) & np.roll(core, -1, 1)
    if core.any():
        assert values[core].mean() > values[inside(scene) & ~core].mean()


def test_bigger_object_is_nearer_in_the_depth_map() -> None:
    scene = replace(SCENES[0], centre=(32.0, 32.0))
    nearest = [int(depth(replace(scene, side=side)).max()) for side in (26, 34, 42, 48)]
    assert nearest == sorted(set(nearest))


def test_pose_rotates_and_mirrors_with_its_object() -> None:
    upright = Scene("fox", "blue", "big", "in the middle", side=40, centre=(32.0, 32.0))
    points = keypoints(upright)
    assert points[0, -1] == pytest.approx((32, 12))
    assert points[1, 0] == pytest.approx((52, 32))
    assert keypoints(replace(upright, mirror=True))[1, 0] == pytest.approx((12, 32))
    # Counterclockwise: the top moves left, and the right side moves up.
    rotated = keypoints(replace(upright, angle=10.0))
    assert rotated[0, -1][0] < 32
    assert rotated[1, 0][1] < 32
    red = (pose(upright) == (255, 0, 0)).all(-1)
    assert np.nonzero(red)[1].min() > 32
    assert np.array_equal(np.nonzero((pose(replace(upright, mirror=True)) == (255, 0, 0)).all(-1))[1] < 32, red[red])


def test_render_rotates_by_the_same_angle_as_its_pose() -> None:
    """The main axis of an elongated object's mask rotates by the same angle as the limbs."""
    scene = Scene("carrot", "blue", "big", "in the middle", side=46, centre=(32.0, 32.0))

    def mask_angle(scene: Scene) -> float:
        rows, columns = np.nonzero(inside(scene))
        covariance = np.cov(columns, rows)
        return float(np.rad2deg(0.5 * np.arctan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1])))

    def limb_angle(scene: Scene) -> float:
        x, y = keypoints(scene)[1, 0]
        return float(np.rad2deg(np.arctan2(y - 32, x - 32)))

    for angle in (-10.0, 10.0):
        rotated = replace(scene, angle=angle)
        assert mask_angle(rotated) - mask_angle(scene) == pytest.approx(limb_angle(rotated) - limb_angle(scene), abs=2)


def test_images_from_a_folder_are_refused(images: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.control: pocket's control maps need data of pocket's world"):
        Folder(path=str(images), control=PocketControl()).open(32, 4)


# --- evaluation


@pytest.mark.parametrize("control", CONTROLS, ids=name)
def test_true_images_agree_with_their_map_and_not_with_other_maps(control: Control) -> None:
    images = [np.asarray(draw_scene(scene)) for scene in SCENES]
    truth = [expected_area(SceneSample(scene, ""), control) for scene in SCENES]
    matching, shuffled = (float(np.mean(scores(images, t, control))) for t in (truth, truth[1:] + truth[:1]))
    assert matching > 0.9
    assert shuffled < 0.5
    blank = np.full((SIDE, SIDE, 3), 90, np.uint8)
    assert not found(blank, control).any()


def test_line_f1_iou_and_box_of_hand_made_masks() -> None:
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


def small_evaluation(**settings: object) -> ControlMetrics:
    return ControlMetrics(images=3, sampling=Sampling(steps=1, guidance=1.0), **settings)


def opened_world(control: Control | None) -> World:
    world = World(images=3, control=control)
    world.open(SIDE, 4)
    return world


def test_control_metrics_include_base_and_trained_model(tmp_path: Path) -> None:
    without_artifact = RunModels(Pretrained(), tmp_path, "net", torch.device("cpu"))
    metrics = small_evaluation().run(without_artifact, opened_world(PocketControl("pose")), tmp_path)
    keys = ["control_agreement", "control_agreement_shuffled", "background_accuracy", "object_accuracy"]
    assert set(metrics) == {*keys, *(f"base_{key}" for key in keys), "ceiling_control_agreement"}
    assert all(0 <= value <= 1 for value in metrics.values())
    assert all(metrics[key] == metrics[f"base_{key}"] for key in keys)
    assert metrics["ceiling_control_agreement"] > 0.8
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["base_images.png", "trained_images.png"]


def test_metrics_of_a_control_without_maps_of_scenes_are_null_with_a_reason(tmp_path: Path) -> None:
    world = opened_world(None)
    world.control = Paired(str(tmp_path))
    metrics = small_evaluation().run(RunModels(Pretrained(), tmp_path, "net", torch.device("cpu")), world, tmp_path)
    reasons = metrics.pop("reasons")
    assert set(metrics.values()) == {None}
    assert set(reasons) == set(metrics)
    assert "Paired cannot compute maps" in reasons["control_agreement"]


def test_control_metrics_refuse_unsuitable_data(images: Path) -> None:
    facts = Facts(SIDE, 4, 4, "epsilon", 32, SD1)
    small_evaluation().check(opened_world(Canny()), facts)
    with pytest.raises(UserError, match=r"^evaluation: pocket_control needs control maps"):
        small_evaluation().check(opened_world(None), facts)
    folder_data = Folder(path=str(images), control=Canny())
    folder_data.open(32, 4)
    with pytest.raises(UserError, match=r"evaluation=clip"):
        small_evaluation().check(folder_data, facts)
    with pytest.raises(UserError, match="64x64"):
        small_evaluation().check(opened_world(Canny()), Facts(512, 8, 4, "epsilon", 77, SD1))
