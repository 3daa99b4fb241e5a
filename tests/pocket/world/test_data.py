"""Datasets of pocket's world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdtune.backbone import Facts
from sdtune.backbone.families import SD1
from sdtune.errors import UserError
from sdtune.evaluation import ClipMetrics
from sdtune.pocket.evaluation.subject import SubjectMetrics
from sdtune.pocket.world.data import Subject, World
from sdtune.pocket.world.objects import BACKGROUNDS, HELD_OUT
from sdtune.pocket.world.scenes import draw_scene, held_out_combination
from sdtune.sampling.loop import Sampling


def opened(data):
    data.open(64, 4)
    return data


@pytest.mark.parametrize("subject", [thing.name for thing in HELD_OUT])
def test_subject_has_five_images_on_five_backgrounds(subject: str) -> None:
    data = opened(Subject(subject=subject))
    scenes = [sample.scene for sample in data.train]
    assert {scene.thing for scene in scenes} == {subject}
    assert len({scene.background for scene in scenes}) == 5
    assert {scene.size for scene in scenes} == {"big", "small"}
    assert all("sks" in caption for caption in data.all_prompts())


def test_subject_images_do_not_depend_on_the_seed() -> None:
    first, second = opened(Subject(seed=0)), opened(Subject(seed=7))
    assert [s.scene for s in first.train] == [s.scene for s in second.train]


def test_object_that_pocket_was_trained_on_is_refused_as_subject() -> None:
    with pytest.raises(UserError, match=r"^data\.subject: unknown held-out subject 'fox'; use one of .*parrot"):
        Subject(subject="fox")


def test_subject_leaves_at_least_two_backgrounds_unseen() -> None:
    with pytest.raises(UserError, match=r"^data\.images: 12 images leave too few"):
        Subject(images=12)
    assert len(set(BACKGROUNDS) - set(Subject(images=10).backgrounds())) == 2


def test_world_splits_its_images_and_excludes_held_out_combinations() -> None:
    data = opened(World(images=300, validation_images=20))
    assert (len(data.train), len(data.held_out)) == (300, 20)
    scenes = [sample.scene for sample in (*data.train, *data.held_out)]
    assert not any(held_out_combination(s.thing, s.background, s.size) for s in scenes)


def test_pixels_are_the_render_and_content_hashes_identify_scenes() -> None:
    data = opened(World(images=30))
    sample = data.train[3]
    assert np.array_equal(sample.pixels((64, 64), (0.5, 0.5), False), np.asarray(draw_scene(sample.scene)))
    assert len({s.content() for s in data.train}) == 30
    assert sample.content() == opened(World(images=30)).train[3].content()


def test_subject_metrics_use_clip_metrics_for_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def run(self: ClipMetrics, *arguments: Any) -> dict[str, Any]:
        calls.extend((self, *arguments))
        return {"clip_image": 0.5}

    monkeypatch.setattr(ClipMetrics, "run", run)
    facts, data = Facts(64, 4, 4, "epsilon", 32, SD1), opened(World(images=2))
    evaluation = SubjectMetrics(images=4, seed=7, sampling=Sampling(batch_size=70))
    evaluation.check(data, facts)
    arguments: list[Any] = ["models", data, Path("evaluation")]
    assert evaluation.run(*arguments) == {"clip_image": 0.5}
    metrics, *passed = calls
    assert (metrics.count, metrics.seed, metrics.clip, metrics.sampling.batch_size) == (4, 7, "pocket", 8)
    assert evaluation.names == ClipMetrics.names
    assert passed == arguments


def test_subject_metrics_need_images_of_pockets_size() -> None:
    SubjectMetrics().check(opened(Subject()), Facts(64, 4, 4, "epsilon", 32, SD1))
    with pytest.raises(UserError, match="64x64"):
        SubjectMetrics().check(opened(Subject()), Facts(512, 8, 4, "epsilon", 77, SD1))
