"""Prior drift, diversity, memorization and DINO similarity, compared with direct computations."""

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
from sdtune.backbone.families import SD1
from sdtune.errors import UserError
from sdtune.evaluation import ClipMetrics
from sdtune.evaluation.dino import Dino, dino_image
from sdtune.evaluation.distances import distances, nearest, prior_drift
from sdtune.methods import LoRA
from sdtune.sampling.loop import Sampling
from sdtune.sampling.run_models import RunModels

CPU = torch.device("cpu")


def unit_vectors(count: int, seed: int, centre: float = 0.0) -> Tensor:
    vectors = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return F.normalize(vectors + centre, dim=-1)


def test_prior_drift_is_the_unbiased_mmd_with_the_kid_kernel() -> None:
    ours, base = unit_vectors(30, 0, 1.0), unit_vectors(30, 1)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T + 1) ** 3

    def mean_off_diagonal(a: Tensor) -> Tensor:
        products = kernel(a, a)
        return (products.sum() - products.diagonal().sum()) / (len(a) * (len(a) - 1))

    expected = mean_off_diagonal(ours) + mean_off_diagonal(base) - 2 * kernel(ours, base).mean()
    assert prior_drift(ours, base) == pytest.approx(float(expected), rel=1e-4)
    assert prior_drift(ours, base) > 0.3
    assert abs(prior_drift(unit_vectors(200, 2), unit_vectors(200, 3))) < 0.05
    state = torch.get_rng_state()
    assert prior_drift(ours, base[:20]) == prior_drift(ours, base[:20])
    assert torch.equal(torch.get_rng_state(), state)


def test_nearest_is_the_maximum_cosine_similarity() -> None:
    shown = unit_vectors(5, 0)
    assert nearest(shown[:2], shown) == pytest.approx([1.0, 1.0])
    others = unit_vectors(6, 1)
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


def test_dino_embedding_is_the_normalized_class_token(dino_folder: Path) -> None:
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


def test_folder_without_a_dino_model_is_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(UserError, match=r"^evaluation\.dino: cannot load .* as an image model"):
        Dino(str(tmp_path), CPU)


def test_invalid_clip_or_dino_folders_are_refused_before_training(
    dino_folder: Path, images: Path, tmp_path: Path
) -> None:
    data, facts = folder_data(images), Facts(32, 4, 4, "epsilon", 77, SD1)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}', encoding="utf-8")
    for arguments, message in (
        ({"dino": "/nowhere"}, r"dino: /nowhere is not a folder; name a local folder with a DINO"),
        ({"dino": "pocket"}, "dino: pocket is not a folder; name a local folder"),
        ({"clip": "/nowhere"}, "clip: /nowhere is not a folder; name a local folder"),
        ({"clip": str(dino_folder)}, "clip: .* has a model of type dinov2, expected CLIP"),
        ({"dino": str(tmp_path)}, r"dino: .* has no \.safetensors weights"),
    ):
        with pytest.raises(UserError, match=rf"^evaluation\.{message}"):
            ClipMetrics(**arguments).check(data, facts)
    ClipMetrics(clip="pocket", dino=str(dino_folder)).check(data, facts)


def test_strengths_grid_is_written_without_a_metric_model(tiny: Path, images: Path, tmp_path: Path) -> None:
    source = Pretrained(str(tiny))
    model = LoRA(rank=2, backbone=source, optimizer=adamw(1e-1))
    data = folder_data(images)
    fit(model, data, 1)
    model.artifact(tmp_path / "artifact", "lora")
    models = RunModels(source, tmp_path / "artifact", "lora", CPU)
    metrics = ClipMetrics(images=2, sampling=Sampling(steps=1)).run(models, data, tmp_path / "evaluation")
    assert all(value is None for key, value in metrics.items() if key != "reasons")
    assert [file.name for file in (tmp_path / "evaluation").iterdir()] == ["strengths.png"]


def test_all_metrics_of_a_run_are_computed(dino_folder: Path, tiny: Path, images: Path, tmp_path: Path) -> None:
    source = Pretrained(str(tiny))
    model = LoRA(rank=2, backbone=source, optimizer=adamw(1e-1))
    data = folder_data(images, class_prompt="a dog", class_images=2)
    fit(model, data, 2)
    model.artifact(tmp_path / "artifact", "lora")
    evaluation = ClipMetrics(images=4, clip="pocket", dino=str(dino_folder), sampling=Sampling(steps=1))
    metrics = evaluation.run(RunModels(source, tmp_path / "artifact", "lora", CPU), data, tmp_path / "evaluation")
    names = ("clip_image", "clip_text", "diversity", "memorisation", "dino_image")
    computed = {key: value for key, value in metrics.items() if value is not None and key != "reasons"}
    assert set(computed) == {*names, *(f"base_{key}" for key in names), "prior_drift"}
    assert all(isinstance(value, float) for value in computed.values())
    assert set(metrics["reasons"]) == {"control_agreement", "base_control_agreement"}
    assert metrics["memorisation"] >= metrics["clip_image"]
    assert metrics["diversity"] != metrics["base_diversity"]
    assert {p.name for p in (tmp_path / "evaluation").iterdir()} >= {
        "strengths.png",
        "trained_class.png",
        "base_class.png",
    }

    data = folder_data(images)
    data.open(32, 4)
    evaluation = ClipMetrics(images=2, clip="pocket", sampling=Sampling(steps=1))
    metrics = evaluation.run(RunModels(source, tmp_path / "artifact", "lora", CPU), data, tmp_path / "without_class")
    assert metrics["prior_drift"] is None
    assert metrics["reasons"]["prior_drift"] == "data.class_prompt is not set"
    assert "evaluation.dino=FOLDER" in metrics["reasons"]["dino_image"]
    json.dumps(metrics, allow_nan=False)
