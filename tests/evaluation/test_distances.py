"""Drift, diversity, memorisation, and likeness by a DINO, against what they are by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from running import adamw, fit, folder_data
from sdtune.backbone import Facts, Pretrained
from sdtune.errors import UserError
from sdtune.evaluation import ClipMetrics
from sdtune.evaluation.dino import Dino, dino_image
from sdtune.evaluation.distances import distances, nearest, prior_drift
from sdtune.methods import LoRA
from sdtune.sampling.loop import Sampling

CPU = torch.device("cpu")


def unit(count: int, seed: int, centre: float = 0.0) -> Tensor:
    drawn = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn + centre, dim=-1)


def test_drift_is_the_unbiased_mmd_under_kids_kernel() -> None:
    ours, base = unit(30, 0, 1.0), unit(30, 1)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T + 1) ** 3

    def apart(a: Tensor) -> Tensor:
        products = kernel(a, a)
        return (products.sum() - products.diagonal().sum()) / (len(a) * (len(a) - 1))

    wanted = apart(ours) + apart(base) - 2 * kernel(ours, base).mean()
    assert prior_drift(ours, base) == pytest.approx(float(wanted), rel=1e-4)
    assert prior_drift(ours, base) > 0.3
    assert abs(prior_drift(unit(200, 2), unit(200, 3))) < 0.05
    state = torch.get_rng_state()
    assert prior_drift(ours, base[:20]) == prior_drift(ours, base[:20])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_nearest_training_image() -> None:
    shown = unit(5, 0)
    assert nearest(shown[:2], shown) == pytest.approx([1.0, 1.0])
    others = unit(6, 1)
    assert nearest(others, shown) == pytest.approx([max(float(o @ s) for s in shown) for o in others], abs=1e-6)
    assert distances(shown[:1].expand(4, -1)) == pytest.approx([0.0] * 4, abs=1e-6)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    size = {"shortest_edge": 28}
    BitImageProcessorPil(size=size, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_a_dino_looks_at_the_class_token(dino_folder: Path) -> None:
    dino = Dino(str(dino_folder), CPU)
    images = [np.random.default_rng(i).integers(0, 256, (28, 28, 3), dtype=np.uint8) for i in range(3)]
    embedded = dino.images(images)
    assert embedded.shape == (3, 16)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(3))
    assert dino_image(dino, images[:1], images[:1]) == pytest.approx(1.0, abs=1e-5)
    assert dino_image(dino, images[:1], images[1:]) < 1 - 1e-4
    with torch.no_grad():
        inputs = dino.processor(images=images, return_tensors="pt")
        token = dino.model(**inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(embedded, F.normalize(token, dim=-1))


def test_what_is_no_dino_is_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(UserError, match=r"^evaluation\.dino: .* holds no model of images"):
        Dino(str(tmp_path), CPU)


def test_what_is_no_clip_or_dino_is_refused_before_training(dino_folder: Path, images: Path, tmp_path: Path) -> None:
    data, facts = folder_data(images), Facts(32, 4, 4, "epsilon", 77)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    for own, words in (
        ({"dino": "/nowhere"}, r"dino: /nowhere is not a folder; name a local folder with a DINO"),
        ({"dino": "pocket"}, "dino: pocket is not a folder; name a local folder"),
        ({"clip": "/nowhere"}, "clip: /nowhere is not a folder; name a local folder"),
        ({"clip": str(dino_folder)}, "clip: .* holds a model of the type dinov2, and a CLIP is needed"),
        ({"dino": str(tmp_path)}, r"dino: .* holds no weights as \.safetensors"),
    ):
        with pytest.raises(UserError, match=rf"^evaluation\.{words}"):
            ClipMetrics(**own).check(data, facts)
    ClipMetrics(clip="pocket", dino=str(dino_folder)).check(data, facts)


def test_a_loras_strengths_are_shown_without_any_model_to_measure_with(
    tiny: Path, images: Path, tmp_path: Path
) -> None:
    source = Pretrained(str(tiny))
    model = LoRA(rank=2, backbone=source, optimizer=adamw(1e-1))
    data = folder_data(images)
    fit(model, data, 1)
    model.artifact(tmp_path / "artifact", "mine")
    figures = ClipMetrics(images=2, sampling=Sampling(steps=1)).run(
        source, data, tmp_path / "artifact", "mine", CPU, tmp_path / "seen"
    )
    assert all(value is None for key, value in figures.items() if key != "reasons")
    assert [file.name for file in (tmp_path / "seen").iterdir()] == ["strengths.png"]


def test_all_of_them_on_a_run(dino_folder: Path, tiny: Path, images: Path, tmp_path: Path) -> None:
    source = Pretrained(str(tiny))
    model = LoRA(rank=2, backbone=source, optimizer=adamw(1e-1))
    data = folder_data(images, class_prompt="a dog", class_images=2)
    fit(model, data, 2)
    model.artifact(tmp_path / "artifact", "mine")
    measure = ClipMetrics(images=4, clip="pocket", dino=str(dino_folder), sampling=Sampling(steps=1))
    figures = measure.run(source, data, tmp_path / "artifact", "mine", CPU, tmp_path / "seen")
    both = ("clip_image", "clip_text", "diversity", "memorisation", "dino_image")
    found = {key: value for key, value in figures.items() if value is not None and key != "reasons"}
    assert set(found) == {*both, *(f"base_{key}" for key in both), "prior_drift"}
    assert all(isinstance(value, float) for value in found.values())
    assert set(figures["reasons"]) == {"control_agreement", "base_control_agreement"}
    assert figures["memorisation"] >= figures["clip_image"]
    assert figures["diversity"] != figures["base_diversity"]
    assert {p.name for p in (tmp_path / "seen").iterdir()} >= {"strengths.png", "trained_class.png", "base_class.png"}

    data = folder_data(images)
    data.open(32, 4)
    measure = ClipMetrics(images=2, clip="pocket", sampling=Sampling(steps=1))
    figures = measure.run(source, data, tmp_path / "artifact", "mine", CPU, tmp_path / "again")
    assert figures["prior_drift"] is None
    assert figures["reasons"]["prior_drift"] == "the data has no data.class_prompt"
    assert "evaluation.dino=FOLDER" in figures["reasons"]["dino_image"]
    json.dumps(figures, allow_nan=False)
