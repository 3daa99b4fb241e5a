"""Evaluation classifier: training images, predictions, saving and loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pytorch_lightning.callbacks import ModelCheckpoint

from sdtune.errors import UserError
from sdtune.pocket.evaluation import classifier as evaluation
from sdtune.pocket.evaluation.classifier import NOTHING, Classifier, background, ceilings, load_classifier, reconstruct
from sdtune.pocket.pretraining import classifier as training
from sdtune.pocket.pretraining import loop as pretraining
from sdtune.pocket.pretraining import vae as vaes
from sdtune.pocket.pretraining.classifier import (
    ClassifierTraining,
    PoolBatches,
    pool_images,
    pool_scene,
    save,
    trained_classifier,
)
from sdtune.pocket.pretraining.loop import pretrain
from sdtune.pocket.world.objects import HELD_OUT, SIZES, STYLES, THINGS
from sdtune.pocket.world.scenes import SIDE, draw_scene

STEPS = 30
IMAGES = 256


@pytest.fixture(scope="module", autouse=True)
def _small_batches_on_one_thread() -> Iterator[None]:
    """Small batches on one thread; at this size, more threads cost more time than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "BATCH", 16)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return vaes.build_vae().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vae: AutoencoderKL) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    pool_images(folder, vae, IMAGES)
    return folder


@pytest.fixture(scope="module")
def pool(folder: Path, vae: AutoencoderKL) -> np.ndarray:
    return pool_images(folder, vae, IMAGES)


@pytest.fixture(scope="module")
def trained(folder: Path, vae: AutoencoderKL) -> Classifier:
    return trained_classifier(folder, vae, STEPS, IMAGES)


def test_pool_shows_every_object_in_both_styles_including_held_out_ones() -> None:
    seen = {(scene.thing, scene.style) for scene in map(pool_scene, range(4_000))}
    assert seen == {(thing.name, style) for thing in THINGS for style in STYLES}
    assert {thing.name for thing in HELD_OUT} <= {thing for thing, _ in seen}


def test_every_fourth_image_of_the_pool_is_a_vae_reconstruction(pool: np.ndarray, vae: AutoencoderKL) -> None:
    renders = np.stack([np.asarray(draw_scene(pool_scene(index))) for index in range(8)])
    unchanged = [1, 2, 3, 5, 6, 7]
    assert np.array_equal(pool[unchanged], renders[unchanged])
    assert not np.array_equal(pool[0], renders[0])
    # Within one level: another batch size may sum in another order.
    assert np.abs(pool[[0, 4]].astype(int) - reconstruct(vae, renders[[0, 4]])).max() <= 1


def test_each_vae_has_its_own_pool(folder: Path) -> None:
    torch.manual_seed(1)
    pool_images(folder, vaes.build_vae().eval(), 4)
    torch.manual_seed(2)
    pool_images(folder, vaes.build_vae().eval(), 4)
    assert len(list(folder.glob("pool-*-4-*.npy"))) == 2


def test_batch_is_a_function_of_the_step_and_does_not_change_the_pool(pool: np.ndarray) -> None:
    original_pool = np.array(pool)
    first, second = PoolBatches(pool)(3), PoolBatches(pool)(3)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["images"], PoolBatches(pool)(4)["images"])
    assert np.array_equal(pool, original_pool)


def test_negatives_are_labeled_nothing_without_size_and_style(pool: np.ndarray) -> None:
    batches = PoolBatches(pool)
    truth = torch.cat([batches(step)["truth"] for step in range(60)])
    nothing = truth[:, 0] == len(THINGS)
    assert 0.14 < nothing.float().mean() < 0.26
    assert (truth[nothing, 1:] == -100).all()
    assert (truth[~nothing, 1:] >= 0).all()


def test_mixed_images_keep_their_background(pool: np.ndarray) -> None:
    """A mix has one background, so only the object distinguishes it from true images."""
    batches = PoolBatches(np.stack([np.asarray(draw_scene(pool_scene(index))) for index in range(IMAGES)]))
    rng = np.random.default_rng(0)
    mixed = np.stack([batches.mix(index, rng) for index in range(64)])
    assert background(mixed) == [pool_scene(index).background for index in range(64)]


@pytest.mark.slow
def test_saved_classifier_is_small_enough_to_ship(trained: Classifier, tmp_path: Path) -> None:
    save(trained, tmp_path)
    assert (tmp_path / "classifier.safetensors").stat().st_size <= 1_500_000


@pytest.mark.slow
def test_training_reduces_the_loss(trained: Classifier, pool: np.ndarray) -> None:
    batch = PoolBatches(pool)(0)

    def loss(classifier: Classifier) -> float:
        module = ClassifierTraining(STEPS)
        module.classifier.load_state_dict(classifier.state_dict())
        return module.training_step(batch, 0)["loss"].item()

    torch.manual_seed(0)
    assert loss(trained) < 0.9 * loss(Classifier())


@pytest.mark.slow
def test_saved_classifier_predicts_like_the_trained_one(trained: Classifier, pool: np.ndarray, tmp_path: Path) -> None:
    save(trained, tmp_path)
    rounded = Classifier()
    rounded.load_state_dict(
        {k: v.half().float() if v.is_floating_point() else v for k, v in trained.state_dict().items()}
    )
    expected, actual = rounded.read(pool), load_classifier(tmp_path).read(pool)
    for one, other in zip(expected, actual, strict=True):
        assert np.array_equal(np.array(one), np.array(other))
    assert {*actual.object} <= {NOTHING, *(thing.name for thing in THINGS)}
    assert {*actual.size} <= {*SIZES}
    assert {*actual.style} <= {*STYLES}
    assert actual.object_probability.dtype == np.float32
    assert (actual.size_probability >= 0.5).all()


@pytest.mark.slow
def test_prediction_is_float32_under_autocast_and_does_not_change_the_classifier(
    trained: Classifier, pool: np.ndarray
) -> None:
    original_state = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    expected = trained.read(pool[:8])
    trained.train()
    with torch.autocast("cpu", torch.bfloat16):
        actual = trained.read(pool[:8])
    assert np.array_equal(expected.object_probability, actual.object_probability)
    assert all(torch.equal(tensor, original_state[key]) for key, tensor in trained.state_dict().items())


def test_ceilings_are_the_accuracy_on_held_out_renders(vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = HELD_OUT[0]
    monkeypatch.setattr(evaluation, "HELD_OUT", (subject,))
    monkeypatch.setattr(evaluation, "PLACES", ("in the middle",))
    constant = Classifier()
    bias = constant.state_dict()["heads.0.bias"]  # shares memory with the parameter
    bias[THINGS.index(subject)] = 100
    expected = {"classifier_accuracy": 1.0, "classifier_accuracy_vae": 1.0}
    assert ceilings(constant, vae, seed=0) == expected
    bias[len(THINGS)] = 200
    assert ceilings(constant, vae, seed=0) == dict.fromkeys(expected, 0.0)


@pytest.mark.parametrize("shape", [(0, SIDE, SIDE, 3), (SIDE, SIDE, 3), (1, 3, SIDE, SIDE), (1, 32, 32, 3)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    for reader in (Classifier().read, background):
        with pytest.raises(UserError, match="expected uint8"):
            reader(np.zeros(shape, dtype=np.uint8))


def test_wrong_dtypes_are_refused() -> None:
    with pytest.raises(UserError, match="float32"):
        background(np.zeros((1, SIDE, SIDE, 3), dtype=np.float32))


@pytest.mark.parametrize("missing", ["config.json", "classifier.safetensors"])
def test_missing_classifier_file_is_refused(missing: str, tmp_path: Path) -> None:
    save(Classifier(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=rf"{missing} is missing; train .*sdtune\.pocket\.pretraining\.classifier"):
        load_classifier(tmp_path)


class _Interrupted:
    """Batches that raise an error at step ``at``, like a killed training."""

    def __init__(self, batches: PoolBatches, at: int) -> None:
        self.batches, self.at = batches, at

    def __call__(self, step: int) -> dict[str, Any]:
        if step == self.at:
            raise RuntimeError("killed")
        return self.batches(step)


@pytest.mark.slow
def test_resumed_training_equals_uninterrupted_training(
    trained: Classifier, folder: Path, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frequent(**options: Any) -> ModelCheckpoint:
        return ModelCheckpoint(**{**options, "every_n_train_steps": 10})

    monkeypatch.setattr(pretraining, "ModelCheckpoint", frequent)
    batches = PoolBatches(pool_images(folder, vae, IMAGES))
    torch.manual_seed(vaes.SEED)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(ClassifierTraining(STEPS), _Interrupted(batches, 25), tmp_path)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 20
    resumed = ClassifierTraining(STEPS)
    pretrain(resumed, batches, tmp_path)
    for key, tensor in resumed.classifier.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[key]), key
