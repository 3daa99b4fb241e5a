"""Metrics of pocket's evaluations, on rendered images with known content."""

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
from sdtune.data import Mix
from sdtune.errors import UserError
from sdtune.evaluation.distances import distances
from sdtune.pocket import path
from sdtune.pocket.evaluation import style
from sdtune.pocket.evaluation import subject as evaluation
from sdtune.pocket.evaluation.style import StyleMetrics
from sdtune.pocket.evaluation.subject import SubjectMetrics
from sdtune.pocket.evaluation.subjects import SubjectsMetrics
from sdtune.pocket.world.data import Subject
from sdtune.pocket.world.objects import BACKGROUNDS
from sdtune.pocket.world.scenes import compose_scene, draw_scene
from sdtune.pocket.world.style import Style, drawn
from sdtune.randomness import generator
from sdtune.sampling.loop import Request
from sdtune.sampling.run_models import RunModels

CPU = torch.device("cpu")


def image(thing: str, background: str, number: int, kind: str = "fluent") -> np.ndarray:
    scene = compose_scene(thing, background, "big", "in the middle", generator(7, "test", number), kind)
    return np.asarray(draw_scene(scene))


def background_of(prompt: str) -> str:
    return next(name for name in BACKGROUNDS if f" {name} background" in prompt)


@contextmanager
def untrained(*_: Any) -> Iterator[Any]:
    yield SimpleNamespace(vae=AutoencoderKL.from_pretrained(path(), subfolder="vae", local_files_only=True).eval())


def test_diversity_is_the_mean_distance_over_all_pairs() -> None:
    embeddings = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [1 - float(embeddings[i] @ embeddings[j]) for i in range(5) for j in range(5) if i < j]
    means = distances(embeddings)
    assert sum(means) / len(means) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    assert distances(embeddings[:1].expand(4, -1)) == pytest.approx([0] * 4, abs=1e-6)


def test_subject_and_class_metrics_of_rendered_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four subject images and one of four class images show the subject; other class images are identical."""
    data = Subject()
    data.open(64, 4)
    received_requests: list[list[Request]] = []

    def trained_images(_: Any, requests: list[Request], *__: Any) -> list[np.ndarray]:
        received_requests.append(list(requests))
        images = []
        for i, request in enumerate(requests):
            subject = (i % 4 != 0) if "sks" in request.prompt else i % 4 == 0
            images.append(image("parrot" if subject else "duck", background_of(request.prompt), i if subject else 0))
        return images

    def base_images(_: Any, requests: list[Request], *__: Any) -> list[np.ndarray]:
        birds = ["songbird", "penguin", "owl", "duck", "flamingo"]
        return [image(birds[i % 5], background_of(r.prompt), i) for i, r in enumerate(requests)]

    monkeypatch.setattr(evaluation, "generate_images", trained_images)
    monkeypatch.setattr(RunModels, "base_images", base_images)
    monkeypatch.setattr(RunModels, "trained", untrained)
    monkeypatch.setattr(SubjectMetrics, "ceiling", lambda *_: 1.0)
    models = RunModels(Pretrained(), tmp_path, "subject", CPU)
    metrics = SubjectMetrics(images=40, class_images=48).run(models, data, tmp_path / "evaluation")
    assert metrics["subject_accuracy"] == pytest.approx(0.75, abs=0.03)
    assert metrics["base_subject_accuracy"] == 0
    assert metrics["subject_gain"] == metrics["subject_accuracy"]
    assert metrics["background_accuracy"] == 1
    assert metrics["prior_leak"] == pytest.approx(0.25, abs=0.03)
    assert metrics["base_prior_leak"] == 0
    assert 0 < metrics["class_diversity"] < 0.95
    [requests] = received_requests
    unseen = set(BACKGROUNDS) - set(data.backgrounds())
    assert {background_of(r.prompt) for r in requests[:40]} == unseen
    assert not any("sks" in r.prompt for r in requests[40:])
    assert {p.name for p in (tmp_path / "evaluation").iterdir()} == {
        "base_images.png", "trained_images.png", "base_class.png", "trained_class.png", "readings.json",
    }  # fmt: skip
    without_class = SubjectMetrics(images=40).run(models, data, tmp_path / "evaluation")
    assert without_class["prior_leak"] is without_class["prior_drift"] is without_class["class_diversity"] is None
    assert "evaluation.class_images=210" in without_class["reasons"]["prior_drift"]
    with pytest.raises(UserError, match="class_diversity needs a CLIP"):
        SubjectMetrics(class_images=1, clip=None)


def test_style_accuracy_is_measured_on_objects_that_training_did_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Style(objects=20, images=60)
    data.open(64, 4)
    shown = {sample.scene.thing for sample in data.train}
    assert shown == {thing.name for thing in drawn()[:20]}
    assert {sample.scene.style for sample in data.train} == {"noto"}
    assert all(sample.caption.endswith(", in sks style") for sample in data.train)
    evaluation = StyleMetrics(objects=24, seeds=2)
    scenes, shown_scenes = evaluation.scenes(data, False), evaluation.scenes(data, True)
    assert len(scenes) == len(shown_scenes) == 48
    assert {scene.thing for scene in shown_scenes} == shown
    assert len({scene.thing for scene in scenes}) == 24
    assert not shown & {scene.thing for scene in scenes}

    def renders(kind: str, scenes: list[Any]) -> Any:
        return lambda *_: [image(s.thing, s.background, i, kind) for i, s in enumerate(scenes)]

    # Only the unseen objects are in the style, so that swapped groups are noticed.
    monkeypatch.setattr(
        style, "generate_images", lambda *_: renders("noto", scenes)() + renders("fluent", shown_scenes)()
    )
    monkeypatch.setattr(RunModels, "base_images", renders("fluent", scenes))
    monkeypatch.setattr(RunModels, "trained", untrained)
    monkeypatch.setattr(RunModels, "base", untrained)
    monkeypatch.setattr(style, "reconstruction_psnr", lambda vae, renders: [30.0] * len(renders))
    metrics = evaluation.run(RunModels(Pretrained(), tmp_path, "style", CPU), data, tmp_path / "evaluation")
    assert metrics["style_accuracy"] > 0.95
    assert metrics["base_style_accuracy"] < 0.05
    assert metrics["shown_style_accuracy"] < 0.05
    assert metrics["object_accuracy"] > 0.95
    assert metrics["background_accuracy"] == 1


def test_style_metrics_refuse_unsuitable_data() -> None:
    facts = Pretrained().facts
    data = Style(objects=90)
    data.open(64, 4)
    with pytest.raises(UserError, match=r"^evaluation.objects: max \d+ with data.objects=90, got 26"):
        StyleMetrics().check(data, facts)
    other = Subject()
    other.open(64, 4)
    with pytest.raises(UserError, match="data=pocket_style"):
        StyleMetrics().check(other, facts)
    with pytest.raises(UserError, match=r"^data.objects: max \d+, got 1000"):
        Style(objects=1000)


def test_metrics_of_two_subjects_of_rendered_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the parrot's images, three of four show it and one the koala; the koala's show a trained object instead."""
    data = Mix(sources={"bird": Subject(token="sks"), "bear": Subject(subject="koala", token="ohwx")})
    data.open(64, 4)

    def generate(_: Any, requests: list[Request], *__: Any) -> list[np.ndarray]:
        things = ("parrot", "parrot", "parrot", "koala")
        return [
            image(things[number % 4] if "sks" in request.prompt else "apple", background_of(request.prompt), number)
            for number, request in enumerate(requests)
        ]

    monkeypatch.setattr("sdtune.pocket.evaluation.subjects.generate_images", generate)
    monkeypatch.setattr(RunModels, "trained", untrained)
    monkeypatch.setattr(
        RunModels,
        "base_images",
        lambda _, requests, *__: [image("apple", background_of(r.prompt), 1) for r in requests],
    )
    monkeypatch.setattr(SubjectMetrics, "ceiling", lambda *_: 1.0)
    models = RunModels(Pretrained(), tmp_path, "net", CPU)
    evaluation = SubjectsMetrics(images=12)
    evaluation.check(data, Pretrained().facts)
    metrics = evaluation.run(models, data, tmp_path / "evaluation")
    assert {*evaluation.names} <= {*metrics}
    assert metrics["subject_gain/bird"] == pytest.approx(0.75, abs=0.1)
    assert metrics["mixed_up/bird"] == pytest.approx(0.25, abs=0.1)
    assert (metrics["subject_gain/bear"], metrics["mixed_up/bear"]) == (0, 0)
    assert metrics["subject_gain"] == pytest.approx(metrics["subject_gain/bird"] / 2)
    assert metrics["subject_gain_lowest"] == 0
    assert metrics["base_mixed_up"] == 0
    assert metrics["background_accuracy"] == 1
    assert (tmp_path / "evaluation" / "trained_images.png").is_file()


def test_metrics_of_subjects_refuse_other_data() -> None:
    single = Subject()
    single.open(64, 4)
    with pytest.raises(UserError, match=r"^evaluation: pocket_subjects needs a mix of pocket's subjects"):
        SubjectsMetrics().check(single, Pretrained().facts)
    mixed = Mix(sources={"bird": Subject(), "style": Style(images=2)})
    with pytest.raises(UserError, match="but style is none; use kind: pocket_subject for all sources"):
        SubjectsMetrics().check(mixed, Pretrained().facts)
