"""Computation of pocket's quality metrics."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from experiments.pocket import quality
from experiments.pocket.quality import agreement, grid, measure
from sdtune.pocket.evaluation.classifier import Classifier
from sdtune.pocket.evaluation.psnr import psnr
from sdtune.pocket.pretraining import vae as vaes
from sdtune.pocket.world.scenes import draw_scene, held_out_scenes


def test_psnr_equals_its_formula() -> None:
    truth = np.full((2, 2, 2, 3), 100, dtype=np.uint8)
    images = truth.copy()
    images[0] += 5  # MSE 25
    images[1, 0, 0, 0] = 90  # one value of twelve off by ten: MSE 100 / 12
    expected = [20 * math.log10(255) - 10 * math.log10(25), 20 * math.log10(255) - 10 * math.log10(100 / 12)]
    assert psnr(images, truth) == pytest.approx(expected, rel=1e-12)


def test_psnr_does_not_overflow_eight_bits() -> None:
    black = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    white = np.full((1, 2, 2, 3), 255, dtype=np.uint8)
    assert psnr(black, white) == psnr(white, black) == pytest.approx([0.0])


def test_psnr_of_equal_images_is_infinite() -> None:
    image = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    assert psnr(image, image) == [math.inf]


def test_agreement_is_the_fraction_of_equal_labels() -> None:
    assert agreement(["dog", "cat", "dog", "dog"], ["dog", "cat", "dogs", "cat"]) == 0.5


def test_measure_returns_the_quality_metrics_of_true_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ceiling = {"classifier_accuracy": 0.75, "classifier_accuracy_vae": 0.5}
    monkeypatch.setattr(quality, "ceilings", lambda classifier, vae, seed: ceiling)  # avoids 1,800 renders
    scenes = held_out_scenes(3, 6)
    images = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    images[0] = 255 - images[0]
    torch.manual_seed(0)
    metrics = measure(images, scenes, Classifier(), vaes.build_vae().eval(), seed=3)
    assert list(metrics) == [
        "background_accuracy",
        "object_accuracy",
        "size_accuracy",
        "vae_psnr_db",
        "classifier_accuracy",
        "classifier_accuracy_vae",
        "prompts",
        "seed",
    ]
    assert (metrics["background_accuracy"], metrics["prompts"], metrics["seed"]) == (5 / 6, 6, 3)
    assert ceiling.items() <= metrics.items()
    assert json.loads(json.dumps(metrics)) == metrics


def test_grid_shows_every_image_at_twice_its_size() -> None:
    scenes = held_out_scenes(0, 10)
    images = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    sheet = np.asarray(grid(images, scenes))
    assert sheet.shape == (2 * (128 + 28), 8 * 128, 3)
    assert np.array_equal(sheet[156 : 156 + 128 : 2, 128:256:2], images[9])
