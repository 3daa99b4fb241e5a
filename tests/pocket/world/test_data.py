"""Data drawn from the image world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdtune.backbone import Facts
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
def test_a_subject_has_five_images_on_as_many_backgrounds(subject: str) -> None:
    data = opened(Subject(subject=subject))
    scenes = [sample.scene for sample in data.train]
    assert {scene.thing for scene in scenes} == {subject}
    assert len({scene.background for scene in scenes}) == 5
    assert {scene.size for scene in scenes} == {"big", "small"}
    assert all("sks" in caption for caption in data.captions())


def test_its_images_do_not_change_with_the_seed() -> None:
    first, second = opened(Subject(seed=0)), opened(Subject(seed=7))
    assert [s.scene for s in first.train] == [s.scene for s in second.train]


def test_a_subject_that_pocket_knows_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.subject: 'fox' is not a held-out subject; there are .*parrot"):
        Subject(subject="fox")


def test_some_backgrounds_stay_unseen() -> None:
    with pytest.raises(UserError, match=r"^data\.images: 12 leaves too few"):
        Subject(images=12)
    assert len(set(BACKGROUNDS) - set(Subject(images=10).backgrounds())) == 2


def test_the_world_holds_out_combinations_and_images() -> None:
    data = opened(World(images=300, validation_images=20))
    assert (len(data.train), len(data.held_out)) == (300, 20)
    seen = [sample.scene for sample in (*data.train, *data.held_out)]
    assert not any(held_out_combination(s.thing, s.background, s.size) for s in seen)


def test_pixels_are_the_drawing_and_content_names_it() -> None:
    data = opened(World(images=30))
    sample = data.train[3]
    assert np.array_equal(sample.pixels((64, 64), (0.5, 0.5), False), np.asarray(draw_scene(sample.scene)))
    assert len({s.content() for s in data.train}) == 30
    assert sample.content() == opened(World(images=30)).train[3].content()


def test_the_subjects_figures_are_clips_where_the_images_are_no_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(self: ClipMetrics, *given: Any) -> dict[str, Any]:
        seen.extend((self, *given))
        return {"clip_image": 0.5}

    monkeypatch.setattr(ClipMetrics, "run", run)
    facts, data = Facts(64, 4, 4, "epsilon", 32), opened(World(images=2))
    figures = SubjectMetrics(images=4, seed=7, sampling=Sampling(batch_size=70))
    figures.check(data, facts)
    given: list[Any] = ["source", data, Path("artifact"), "mine", "cpu", Path("evaluation")]
    assert figures.run(*given) == {"clip_image": 0.5}
    by, *passed = seen
    assert (by.count, by.seed, by.clip, by.sampling.batch_size) == (4, 7, "pocket", 8)
    assert figures.names == ClipMetrics.names
    assert passed == given


def test_the_subjects_figures_read_images_of_the_worlds_size() -> None:
    SubjectMetrics().check(opened(Subject()), Facts(64, 4, 4, "epsilon", 32))
    with pytest.raises(UserError, match="64x64"):
        SubjectMetrics().check(opened(Subject()), Facts(512, 8, 4, "epsilon", 77))
