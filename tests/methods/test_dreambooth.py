"""DreamBooth: pairs of subject images and class images, which the untrained model generates before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

import sdtune
from running import Spy, adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.new_token_vectors import token_vectors
from sdtune.backbone.new_tokens import NewToken
from sdtune.data.prior import CLASS_POSITION_OFFSET, class_image_index, class_images, generate_missing
from sdtune.errors import UserError
from sdtune.methods import DreamBooth, LoRA
from sdtune.sampling.loop import Request, Sampling, generate
from sdtune.sampling.run_models import RunModels


class RecordBatches(Callback):
    """Records the batches and the metrics of each micro-batch."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.metrics.append({k: float(v) for k, v in pl_module.step_metrics.items()})


def class_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("class/*/*/*.png"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_micro_batch_has_pairs_of_subject_and_class_images(tiny: Path, images: Path, cache: Path) -> None:
    data = folder_data(images, batch_size=4, class_prompt="a dog", class_images=3, prior_weight=0.5)
    recorded = RecordBatches()
    model = DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-4))
    fit(model, data, 3, [recorded], accumulate_grad_batches=2)
    assert len(class_files(cache)) == 3
    assert len(recorded.batches) == 6
    for batch in recorded.batches:
        assert batch["subject_count"] == 2
        assert batch["moments"].shape[0] == len(batch["conditioning"]) == len(batch["prompts"]) == 4
        assert batch["prompts"][2:] == ["a dog", "a dog"]
        assert all(prompt.startswith("picture number") for prompt in batch["prompts"][:2])
        assert batch["positions"][2:] == [p + CLASS_POSITION_OFFSET for p in batch["positions"][:2]]
    for row in recorded.metrics[1::2]:
        assert row["loss"] == pytest.approx(row["loss/diffusion"] + 0.5 * row["loss/prior"], rel=1e-5)
        assert row["loss/prior"] != row["loss/diffusion"]


def test_gradient_of_the_prior_loss_is_multiplied_by_prior_weight(tiny: Path, images: Path, cache: Path) -> None:
    """The gradient is grad L(subject) + lambda grad L(class), so it is linear in lambda."""

    def gradients(weight: float) -> dict[str, torch.Tensor]:
        spy = Spy()
        data = folder_data(images, class_prompt="a dog", class_images=2, prior_weight=weight)
        fit(DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(0.0)), data, 1, [spy])
        return spy.gradients[0]

    one, two, three = gradients(1.0), gradients(2.0), gradients(3.0)
    for key in one:
        torch.testing.assert_close(three[key] - two[key], two[key] - one[key], rtol=1e-3, atol=1e-6)
    assert any((two[key] - one[key]).abs().max() > 1e-4 for key in one)


def test_class_images_are_generated_once_by_the_untrained_model(
    tiny: Path, images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(count: int, seed: int = 0) -> None:
        data = folder_data(images, class_prompt="a dog", class_images=count)
        fit(DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-1), seed=seed), data, 1)

    train(2)
    first = {path: path.read_bytes() for path in class_files(cache)}
    assert len(first) == 2
    class_files(cache)[0].unlink()
    train(3, seed=4)  # generates only missing images, and the same images after another training
    second = {path: path.read_bytes() for path in class_files(cache)}
    assert len(second) == 3
    for path, content in first.items():
        assert second[path] == content
    monkeypatch.setattr("sdtune.training.caching.generate", lambda *_: pytest.fail("generated again"))
    train(3)


def test_several_class_prompts_are_used_alternately(tiny: Path, images: Path, cache: Path) -> None:
    data = folder_data(images, class_prompt=["a dog", "a big dog"], class_images=5)
    fit(DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3)), data, 1)
    assert [sample.caption for sample in data.class_samples] == ["a dog", "a big dog", "a dog", "a big dog", "a dog"]
    assert sorted(path.name for path in class_files(cache)) == [f"{number:05d}.png" for number in range(5)]
    assert {path.parent.name for path in class_files(cache)} == {s.path.parent.name for s in data.class_samples}
    one_prompt = folder_data(images, class_prompt="a dog", class_images=1)
    fit(DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3)), one_prompt, 1)
    assert one_prompt.class_samples[0].path == data.class_samples[0].path  # same prompt, so not generated again


def test_several_class_prompts_with_a_class_folder_are_refused(images: Path) -> None:
    with pytest.raises(UserError, match=r"^data.class_prompt: several prompts are not possible with"):
        folder_data(images, class_path=str(images), class_prompt=["a dog", "a big dog"])


def test_each_class_image_is_used_once_per_epoch() -> None:
    order = [class_image_index(0, 5, number) for number in range(15)]
    for epoch in range(3):
        assert sorted(order[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:10] or order[5:10] != order[10:]


def test_class_images_are_read_from_a_folder(tiny: Path, images: Path, tmp_path: Path, cache: Path) -> None:
    class_folder = tmp_path / "dogs"
    class_folder.mkdir()
    for path in images.glob("*.png"):
        (class_folder / path.name).write_bytes(path.read_bytes())
    recorded = RecordBatches()
    data = folder_data(images, class_path=str(class_folder), class_prompt="any dog")
    fit(LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-4)), data, 2, [recorded])
    assert [batch["prompts"][2:] for batch in recorded.batches] == [["any dog"] * 2] * 2
    assert not class_files(cache)


def test_missing_class_images_and_a_trained_vae_are_refused(tiny: Path, images: Path) -> None:
    model = DreamBooth(backbone=Pretrained(str(tiny)))
    with pytest.raises(UserError, match="^data.class_prompt: missing"):
        model.check_data(folder_data(images))
    model.check_data(folder_data(images, prior_weight=0))
    model.check_data(folder_data(images, class_prompt="a dog"))
    with pytest.raises(UserError, match="^method.parts: DreamBooth does not train the VAE"):
        DreamBooth(backbone=Pretrained(str(tiny)), parts=["vae"])


def test_masks_apply_only_to_subject_images(tiny: Path, images: Path, cache: Path) -> None:
    from PIL import Image

    for path in images.glob("*.png"):
        mask = np.zeros((36, 40), dtype=np.uint8)
        mask[:, :20] = 255
        Image.fromarray(mask).save(path.with_suffix(".mask.png"))
    recorded = RecordBatches()
    data = folder_data(images, mask="file", class_prompt="a dog", class_images=2)
    fit(DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-4)), data, 1, [recorded])
    mask = recorded.batches[0]["mask"]
    assert mask.shape == (4, 1, 8, 8)
    assert mask[:2, ..., :3].min() > 0.99
    assert mask[:2, ..., 5:].max() < 0.01
    assert mask[2:].min() == 1
    assert len(data.train) == 5, "a mask file is not a training image"


def test_content_key_of_a_class_image_depends_on_the_model(tmp_path: Path) -> None:
    first, second = (class_images(tmp_path / model, ["a dog"], 1, 32)[0].content() for model in ("one", "other"))
    assert first != second


def test_each_class_image_is_generated_by_exactly_one_process(tmp_path: Path) -> None:
    """Also if one process has already written images when the next process starts."""
    images = class_images(tmp_path, ["a dog"], 8, 8)
    generated: list[int] = []

    def generate_images(prompts_and_seeds: Any) -> Any:
        for _, number in prompts_and_seeds:
            generated.append(number)
            yield np.zeros((8, 8, 3), np.uint8)

    for rank in (0, 1):
        generate_missing(images, generate_images, rank, 2, batch_size=2)
    assert sorted(generated) == list(range(8))


def test_class_images_after_an_interruption_are_generated_in_the_same_batches(tmp_path: Path) -> None:
    """The last bits of an image depend on its batch."""
    images = class_images(tmp_path, ["a dog"], 7, 8)
    for number in (0, 1, 2, 4, 5):
        images[number].path.parent.mkdir(parents=True, exist_ok=True)
        images[number].path.write_bytes(b"kept")
    requested: list[int] = []

    def generate_images(prompts_and_seeds: Any) -> Any:
        for _, number in prompts_and_seeds:
            requested.append(number)
            yield np.zeros((8, 8, 3), np.uint8)

    generate_missing(images, generate_images, 0, 1, batch_size=2)
    assert requested == [2, 3, 6]
    assert [image.path.read_bytes() == b"kept" for image in images] == [True] * 3 + [False, True, True, False]


def test_new_tokens_trained_with_the_unet_belong_to_the_trained_pipeline(
    tiny: Path, images: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pivotal tuning with DreamBooth: the artifact and the trained modules generate the same image."""
    source = Pretrained(str(tiny))
    model = DreamBooth(
        backbone=source, optimizer=adamw(1e-2), new_tokens=[NewToken("<my_dog>", "dog", 2)], tokens_lr=1e-1
    )
    data = folder_data(images, class_prompt="a dog", class_images=2, templates=["<my_dog>, {}"])
    fit(model, data, 2)
    model.artifact(tmp_path, "mine")
    prompt, settings = "one <my_dog>", Sampling(steps=2, guidance=4.0)
    token_files = [{"path": str(tmp_path / "learned_embeds.safetensors")}]
    trained_pipeline = Pretrained(str(tmp_path / "mine"))
    [loaded] = sdtune.sample(prompt, token_files, backbone=trained_pipeline, sampling=settings)
    model.backbone.prepare_for_device(torch.device("cpu"))
    [live] = generate(model.backbone.eval(), [Request(prompt, 0)], settings)
    assert np.abs(np.asarray(loaded).astype(int) - live).max() <= 1
    [without_token] = sdtune.sample(prompt, backbone=trained_pipeline, sampling=settings)
    assert np.abs(np.asarray(without_token).astype(int) - live).max() > 2
    sdtune.sample(prompt, token_files, backbone=source, sampling=settings)
    assert "trained on another backbone" in caplog.text


def test_evaluation_uses_the_final_new_tokens_and_not_those_of_snapshots(
    tiny: Path, images: Path, cache: Path, tmp_path: Path
) -> None:
    """The tokens of a snapshot belong to the pipeline of the same step."""
    model = DreamBooth(
        backbone=Pretrained(str(tiny)), optimizer=adamw(1e-2), new_tokens=[NewToken("<my_dog>", "dog")], tokens_lr=1e-1
    )
    data = folder_data(images, class_prompt="a dog", class_images=2, templates=["<my_dog>, {}"])
    fit(model, data, 1)
    model.snapshot(tmp_path, "mine-step00000001", "-step00000001")
    for _, parameter in model.trainable():
        parameter.data += 0.01
    model.artifact(tmp_path, "mine")
    with RunModels(Pretrained(str(tiny)), tmp_path, "mine", torch.device("cpu")).trained() as backbone:
        assert torch.equal(token_vectors(backbone)["<my_dog>"][0], token_vectors(model.backbone)["<my_dog>"][0])
