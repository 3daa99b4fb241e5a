"""Masks of a tiny random CLIPSeg: values, size, threshold, and union of words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from caption_models import build_clipseg, save_photos
from sdtune.captioning.masker import Masker, mask_pixels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clipseg(tmp_path_factory.mktemp("models") / "clipseg")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = save_photos(tmp_path_factory.mktemp("photos"), 3, 40, 64)
    return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]


def masks(folder: Path, words: list[str], photos: list[Image.Image], threshold: float | None = None) -> np.ndarray:
    return np.stack(Masker(folder, words, threshold, CPU, "32-true")(photos))


def test_mask_is_the_sigmoid_of_the_logits_at_the_size_of_the_image(clipseg: Path, photos: list[Image.Image]) -> None:
    model, processor = CLIPSegForImageSegmentation.from_pretrained(clipseg), CLIPSegProcessor.from_pretrained(clipseg)
    made = masks(clipseg, ["a cat"], photos)
    assert made.dtype == np.uint8
    assert made.shape == (3, 64, 40)
    for photo, mask in zip(photos, made, strict=True):
        with torch.no_grad():
            logits = model(**processor(text=["a cat"], images=[photo], return_tensors="pt", padding=True)).logits
        expected = torch.nn.functional.interpolate(logits.sigmoid()[None], size=(64, 40), mode="bilinear")[0, 0]
        assert np.abs(expected.numpy() * 255 - mask).max() <= 0.6


def test_settings_of_published_models_are_read(clipseg: Path, photos: list[Image.Image], tmp_path: Path) -> None:
    """CIDAS/clipseg-rd64-refined has the file of an older release of transformers."""
    folder = tmp_path / "clipseg"
    shutil.copytree(clipseg, folder)
    (folder / "processor_config.json").unlink()
    settings = {
        "feature_extractor_type": "ViTFeatureExtractor",
        "do_resize": True,
        "size": 32,
        "resample": 2,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert np.array_equal(masks(folder, ["cat"], photos), masks(clipseg, ["cat"], photos))


def test_mask_of_several_words_is_their_union(clipseg: Path, photos: list[Image.Image]) -> None:
    """The maximum is taken before the resizing, so it may differ by a rounding error only at the model's own size."""
    squares = [photo.resize((32, 32)) for photo in photos]
    cat, dog = masks(clipseg, ["cat"], squares), masks(clipseg, ["a large dog"], squares)
    assert (cat != dog).any()
    both = masks(clipseg, ["cat", "a large dog"], squares)
    assert np.abs(both.astype(int) - np.maximum(cat, dog)).max() <= 1
    assert len({mask.tobytes() for mask in both}) == len(photos)


def test_threshold_makes_the_mask_binary(clipseg: Path, photos: list[Image.Image]) -> None:
    gray, binary = masks(clipseg, ["cat"], photos), masks(clipseg, ["cat"], photos, 0.5)
    assert set(np.unique(binary)) == {0, 255}
    assert (binary[gray > 128] == 255).all()
    assert (binary[gray < 127] == 0).all()


def test_threshold_is_the_minimum_of_white() -> None:
    probabilities = torch.tensor([[0.2, 0.3], [0.5, 1.0]])
    assert mask_pixels(probabilities, (2, 2), None).tolist() == [[51, 76], [128, 255]]
    assert mask_pixels(probabilities, (2, 2), 0.5).tolist() == [[0, 0], [255, 255]]
