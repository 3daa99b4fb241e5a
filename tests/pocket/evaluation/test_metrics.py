"""The metrics of pocket's evaluations, on images of which everything is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from sdtune.backbone import Pretrained
from sdtune.errors import UserError
from sdtune.evaluation.distances import distances
from sdtune.pocket import path
from sdtune.pocket.evaluation import style
from sdtune.pocket.evaluation import subject as evaluation
from sdtune.pocket.evaluation.style import StyleMetrics
from sdtune.pocket.evaluation.subject import SubjectMetrics
from sdtune.pocket.world.data import Subject
from sdtune.pocket.world.objects import BACKGROUNDS
from sdtune.pocket.world.scenes import compose_scene, draw_scene
from sdtune.pocket.world.style import Style, drawn
from sdtune.randomness import generator
from sdtune.sampling.loop import Request

CPU = torch.device("cpu")


def image(thing: str, background: str, number: int, kind: str = "fluent") -> np.ndarray:
    scene = compose_scene(thing, background, "big", "in the middle", generator(7, "test", number), kind)
    return np.asarray(draw_scene(scene))


def background_of(prompt: str) -> str:
    return next(name for name in BACKGROUNDS if f" {name} background" in prompt)


@contextmanager
def nothing(*_: Any) -> Iterator[Any]:
    yield SimpleNamespace(vae=AutoencoderKL.from_pretrained(path(), subfolder="vae", local_files_only=True).eval())


def test_diversity_is_the_mean_distance_of_any_two() -> None:
    rows = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [1 - float(rows[i] @ rows[j]) for i in range(5) for j in range(5) if i < j]
    found = distances(rows)
    assert sum(found) / len(found) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    assert distances(rows[:1].expand(4, -1)) == pytest.approx([0] * 4, abs=1e-6)


def test_subject_and_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four images show the subject; a quarter of the class's do, and the others are all one image."""
    data = Subject()
    data.open(64, 4)
    requests_seen: list[list[Request]] = []

    def trained_draws(_: Any, requests: list[Request], *__: Any) -> list[np.ndarray]:
        requests_seen.append(list(requests))
        made = []
        for i, request in enumerate(requests):
            subject = (i % 4 != 0) if "sks" in request.prompt else i % 4 == 0
            made.append(image("parrot" if subject else "duck", background_of(request.prompt), i if subject else 0))
        return made

    def base_draws(_: Any, requests: list[Request], *__: Any) -> list[np.ndarray]:
        birds = ["songbird", "penguin", "owl", "duck", "flamingo"]
        return [image(birds[i % 5], background_of(r.prompt), i) for i, r in enumerate(requests)]

    monkeypatch.setattr(evaluation, "draw_images", trained_draws)
    monkeypatch.setattr(evaluation, "draw_base", base_draws)
    monkeypatch.setattr(evaluation, "trained", nothing)
    monkeypatch.setattr(SubjectMetrics, "ceiling", lambda *_: 1.0)
    figures = SubjectMetrics(images=40, class_images=48).run(
        Pretrained(), data, tmp_path, "subject", CPU, tmp_path / "evaluation"
    )
    assert figures["subject_accuracy"] == pytest.approx(0.75, abs=0.03)
    assert figures["base_subject_accuracy"] == 0
    assert figures["subject_gain"] == figures["subject_accuracy"]
    assert figures["background_accuracy"] == 1
    assert figures["prior_leak"] == pytest.approx(0.25, abs=0.03)
    assert figures["base_prior_leak"] == 0
    assert 0 < figures["class_diversity"] < 0.95
    [requests] = requests_seen
    unseen = set(BACKGROUNDS) - set(data.backgrounds())
    assert {background_of(r.prompt) for r in requests[:40]} == unseen
    assert not any("sks" in r.prompt for r in requests[40:])
    assert {p.name for p in (tmp_path / "evaluation").iterdir()} == {
        "base_images.png", "trained_images.png", "base_class.png", "trained_class.png", "readings.json",
    }  # fmt: skip
    without = SubjectMetrics(images=40).run(Pretrained(), data, tmp_path, "subject", CPU, tmp_path / "evaluation")
    assert without["prior_leak"] is without["prior_drift"] is without["class_diversity"] is None
    assert "evaluation.class_images=210" in without["reasons"]["prior_drift"]
    with pytest.raises(UserError, match="class_diversity needs a CLIP"):
        SubjectMetrics(class_images=1, clip=None)


def test_style_is_read_on_objects_that_were_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Style(objects=20, images=60)
    data.open(64, 4)
    shown = {sample.scene.thing for sample in data.train}
    assert shown == {thing.name for thing in drawn()[:20]}
    assert {sample.scene.style for sample in data.train} == {"noto"}
    assert all(sample.caption.endswith(", in sks style") for sample in data.train)
    figures = StyleMetrics(objects=24, seeds=2)
    scenes, again = figures.scenes(data, False), figures.scenes(data, True)
    assert len(scenes) == len(again) == 48
    assert {scene.thing for scene in again} == shown
    assert len({scene.thing for scene in scenes}) == 24
    assert not shown & {scene.thing for scene in scenes}

    def draws(kind: str, asked: list[Any]) -> Any:
        return lambda *_: [image(s.thing, s.background, i, kind) for i, s in enumerate(asked)]

    # What was not shown comes out well, what was shown does not: the two are told apart.
    monkeypatch.setattr(style, "draw_images", lambda *_: draws("noto", scenes)() + draws("fluent", again)())
    monkeypatch.setattr(style, "draw_base", draws("fluent", scenes))
    monkeypatch.setattr(style, "trained", nothing)
    monkeypatch.setattr(Pretrained, "load", lambda self, seed=0: next(iter([SimpleNamespace(vae=None)])))
    monkeypatch.setattr(style, "reconstruction_psnr", lambda vae, renders: [30.0] * len(renders))
    found = figures.run(Pretrained(), data, tmp_path, "style", CPU, tmp_path / "evaluation")
    assert found["style_accuracy"] > 0.95
    assert found["base_style_accuracy"] < 0.05
    assert found["shown_style_accuracy"] < 0.05
    assert found["object_accuracy"] > 0.95
    assert found["background_accuracy"] == 1


def test_style_figures_refuse_what_they_cannot_measure() -> None:
    facts = Pretrained().facts
    data = Style(objects=90)
    data.open(64, 4)
    with pytest.raises(UserError, match=r"^evaluation.objects: 26, but data.objects=90 leaves \d+"):
        StyleMetrics().check(data, facts)
    other = Subject()
    other.open(64, 4)
    with pytest.raises(UserError, match="data=pocket_style"):
        StyleMetrics().check(other, facts)
    with pytest.raises(UserError, match="^data.objects: the style has"):
        Style(objects=1000)
