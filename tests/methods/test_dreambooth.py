"""DreamBooth: pairs of the subject's and the class's images, the class drawn by the model before training."""

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
from sdtune.backbone.new_tokens import NewToken
from sdtune.backbone.words import word_vectors
from sdtune.data.prior import PLACE, class_images, draw_missing, partner
from sdtune.errors import UserError
from sdtune.evaluation.draw import trained
from sdtune.methods import DreamBooth, LoRA
from sdtune.sampling.loop import Request, Sampling, generate


class Batches(Callback):
    """Keeps what the steps saw, and the losses apart."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.figures: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)
        self.figures.append({k: float(v) for k, v in pl_module.step_metrics.items()})


def drawn(cache: Path) -> list[Path]:
    return sorted(cache.glob("class/*/*/*.png"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_micro_batch_holds_pairs(tiny: Path, images: Path, cache: Path) -> None:
    data = folder_data(images, batch_size=4, class_prompt="a dog", class_images=3, prior_weight=0.5)
    seen = Batches()
    model = DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-4))
    fit(model, data, 3, [seen], accumulate_grad_batches=2)
    assert len(drawn(cache)) == 3
    assert len(seen.seen) == 6
    for batch in seen.seen:
        assert batch["instances"] == 2
        assert batch["moments"].shape[0] == batch["text"].shape[0] == len(batch["prompts"]) == 4
        assert batch["prompts"][2:] == ["a dog", "a dog"]
        assert all(prompt.startswith("picture number") for prompt in batch["prompts"][:2])
        assert batch["positions"][2:] == [p + PLACE for p in batch["positions"][:2]]
    for row in seen.figures[1::2]:
        assert row["loss"] == pytest.approx(row["loss/diffusion"] + 0.5 * row["loss/prior"], rel=1e-5)
        assert row["loss/prior"] != row["loss/diffusion"]


def test_the_weights_are_lambdas(tiny: Path, images: Path, cache: Path) -> None:
    """The gradient is that of the subject plus lambda times that of the class."""

    def gradients(weight: float) -> dict[str, torch.Tensor]:
        spy = Spy()
        data = folder_data(images, class_prompt="a dog", class_images=2, prior_weight=weight)
        fit(DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(0.0)), data, 1, [spy])
        return spy.gradients[0]

    one, two, three = gradients(1.0), gradients(2.0), gradients(3.0)
    for key in one:
        torch.testing.assert_close(three[key] - two[key], two[key] - one[key], rtol=1e-3, atol=1e-6)
    assert any((two[key] - one[key]).abs().max() > 1e-4 for key in one)


def test_class_images_are_drawn_once_by_the_model_before_training(
    tiny: Path, images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(count: int, seed: int = 0) -> None:
        data = folder_data(images, class_prompt="a dog", class_images=count)
        fit(DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-1), seed=seed), data, 1)

    train(2)
    first = {path: path.read_bytes() for path in drawn(cache)}
    assert len(first) == 2
    drawn(cache)[0].unlink()
    train(3, seed=4)  # what is missing alone, and the same image whatever was trained since
    second = {path: path.read_bytes() for path in drawn(cache)}
    assert len(second) == 3
    for path, content in first.items():
        assert second[path] == content
    monkeypatch.setattr("sdtune.training.caching.generate", lambda *_: pytest.fail("drawn again"))
    train(3)


def test_several_class_prompts_take_turns(tiny: Path, images: Path, cache: Path) -> None:
    data = folder_data(images, class_prompt=["a dog", "a big dog"], class_images=5)
    fit(DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3)), data, 1)
    assert [sample.caption for sample in data.class_samples] == ["a dog", "a big dog", "a dog", "a big dog", "a dog"]
    assert sorted(path.name for path in drawn(cache)) == [f"{number:05d}.png" for number in range(5)]
    assert {path.parent.name for path in drawn(cache)} == {sample.path.parent.name for sample in data.class_samples}
    alone = folder_data(images, class_prompt="a dog", class_images=1)
    fit(DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3)), alone, 1)
    assert alone.class_samples[0].path == data.class_samples[0].path  # the same prompt's, so it is not drawn again


def test_several_class_prompts_do_not_caption_a_folder(images: Path) -> None:
    with pytest.raises(UserError, match=r"^data.class_prompt: images of data.class_path"):
        folder_data(images, class_path=str(images), class_prompt=["a dog", "a big dog"])


def test_each_class_image_comes_once_before_any_twice() -> None:
    order = [partner(0, 5, number) for number in range(15)]
    for epoch in range(3):
        assert sorted(order[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:10] or order[5:10] != order[10:]


def test_a_folder_of_ones_own(tiny: Path, images: Path, tmp_path: Path, cache: Path) -> None:
    own = tmp_path / "dogs"
    own.mkdir()
    for path in images.glob("*.png"):
        (own / path.name).write_bytes(path.read_bytes())
    seen = Batches()
    data = folder_data(images, class_path=str(own), class_prompt="any dog")
    fit(LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-4)), data, 2, [seen])
    assert [batch["prompts"][2:] for batch in seen.seen] == [["any dog"] * 2] * 2
    assert not drawn(cache)


def test_without_class_images_it_is_refused(tiny: Path, images: Path) -> None:
    model = DreamBooth(backbone=Pretrained(str(tiny)))
    with pytest.raises(UserError, match="^data.class_prompt is missing"):
        model.check_data(folder_data(images))
    model.check_data(folder_data(images, prior_weight=0))
    model.check_data(folder_data(images, class_prompt="a dog"))
    with pytest.raises(UserError, match="^method.parts: DreamBooth leaves the VAE as it is"):
        DreamBooth(backbone=Pretrained(str(tiny)), parts=["vae"])


def test_masked_pairs(tiny: Path, images: Path, cache: Path) -> None:
    from PIL import Image

    for path in images.glob("*.png"):
        mask = np.zeros((36, 40), dtype=np.uint8)
        mask[:, :20] = 255
        Image.fromarray(mask).save(path.with_suffix(".mask.png"))
    seen = Batches()
    data = folder_data(images, masked=True, class_prompt="a dog", class_images=2)
    fit(DreamBooth(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-4)), data, 1, [seen])
    mask = seen.seen[0]["mask"]
    assert mask.shape == (4, 1, 8, 8)
    assert mask[:2, ..., :3].min() > 0.99
    assert mask[:2, ..., 5:].max() < 0.01
    assert mask[2:].min() == 1
    assert len(data.train) == 5, "a mask is no image"


def test_a_class_image_is_named_by_the_model_that_drew_it(tmp_path: Path) -> None:
    one, other = (class_images(tmp_path / model, ["a dog"], 1, 32)[0].content() for model in ("one", "other"))
    assert one != other


def test_processes_share_out_the_same_list(tmp_path: Path) -> None:
    """One may have written an image already when the next one looks."""
    images = class_images(tmp_path, ["a dog"], 8, 8)
    made: list[int] = []

    def draw(wanted: Any) -> Any:
        for _, number in wanted:
            made.append(number)
            yield np.zeros((8, 8, 3), np.uint8)

    for rank in (0, 1):
        draw_missing(images, draw, rank, 2)
    assert sorted(made) == list(range(8))


def test_words_learned_beside_an_open_unet_belong_to_the_trained_pipeline(
    tiny: Path, images: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pivotal tuning with DreamBooth: what is drawn with the artifact is what the trained modules draw."""
    source = Pretrained(str(tiny))
    model = DreamBooth(
        backbone=source, optimizer=adamw(1e-2), new_tokens=[NewToken("<my_dog>", "dog", 2)], tokens_lr=1e-1
    )
    data = folder_data(images, class_prompt="a dog", class_images=2, templates=["<my_dog>, {}"])
    fit(model, data, 2)
    model.artifact(tmp_path, "mine")
    prompt, settings = "one <my_dog>", Sampling(steps=2, guidance=4.0)
    words = [{"path": str(tmp_path / "learned_embeds.safetensors")}]
    trained = Pretrained(str(tmp_path / "mine"))
    [loaded] = sdtune.sample(prompt, words, backbone=trained, sampling=settings)
    model.backbone.prepare_for_device(torch.device("cpu"))
    [live] = generate(model.backbone.eval(), [Request(prompt, 0)], settings)
    assert np.abs(np.asarray(loaded).astype(int) - live).max() <= 1
    [plain] = sdtune.sample(prompt, backbone=trained, sampling=settings)
    assert np.abs(np.asarray(plain).astype(int) - live).max() > 2
    sdtune.sample(prompt, words, backbone=source, sampling=settings)
    assert "trained on another backbone" in caplog.text


def test_intermediate_words_do_not_stand_in_the_way(tiny: Path, images: Path, cache: Path, tmp_path: Path) -> None:
    """They belong to the pipelines of their steps; the run's evaluation takes the last ones."""
    model = DreamBooth(
        backbone=Pretrained(str(tiny)), optimizer=adamw(1e-2), new_tokens=[NewToken("<my_dog>", "dog")], tokens_lr=1e-1
    )
    data = folder_data(images, class_prompt="a dog", class_images=2, templates=["<my_dog>, {}"])
    fit(model, data, 1)
    model.snapshot(tmp_path, "mine-step00000001", "-step00000001")
    for _, parameter in model.trainable():
        parameter.data += 0.01
    model.artifact(tmp_path, "mine")
    with trained(Pretrained(str(tiny)), tmp_path, "mine", torch.device("cpu")) as backbone:
        assert torch.equal(word_vectors(backbone)["<my_dog>"][0], word_vectors(model.backbone)["<my_dog>"][0])
