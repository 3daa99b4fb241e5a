"""The data module: buckets, captions, dropout, flips, crops and caches, from a folder of images."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from image_data import batches, encode, encoders, equal, noise, opened, text
from sdtune.data import Folder, ImageDataModule
from sdtune.data.datamodule import VALIDATION_TIMESTEPS
from sdtune.data.previews import preview_prompts
from sdtune.errors import UserError


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """Six images of 64x64."""
    for i in range(6):
        noise(tmp_path / "some" / f"{i}.png", 64, 64, seed=i, caption=f"dog {i}")
    return tmp_path / "some"


# --- buckets


def test_images_of_two_shapes_train_at_512_in_buckets_of_their_own(tmp_path: Path) -> None:
    for i in range(3):
        noise(tmp_path / f"tall{i}.png", 512, 768, seed=i)
        noise(tmp_path / f"wide{i}.png", 640, 384, seed=i)
    data = opened(tmp_path, side=512, steps=4)
    buckets = data.buckets(data.train)
    assert set(map(len, buckets.values())) == {3}
    # 512x768 has more than 512^2 pixels and is scaled down; 640x384 has fewer and keeps its size.
    assert set(buckets) == {(384, 576), (640, 384)} or set(buckets) == {(384, 640), (640, 384)}
    for (width, height), entries in buckets.items():
        assert width * height <= 512**2
        assert not width % 64
        assert not height % 64
        names = {Path(str(data.train[entry])).name[:4] for entry in entries}
        assert names == {"wide" if width > height else "tall"}
    shapes = set()
    for batch in batches(data):
        _, channels, height, width = batch["pixels"].shape
        shapes.add((width, height))
        assert channels == 3
    assert shapes == set(buckets)


def test_the_resolution_is_the_backbones_or_ones_own(some: Path) -> None:
    assert batches(opened(some, side=64))[0]["pixels"].shape == (2, 3, 64, 64)
    assert batches(opened(some, side=64, resolution=32))[0]["pixels"].shape == (2, 3, 32, 32)
    with pytest.raises(UserError, match=r"data\.resolution: 62 is not a multiple of 4"):
        opened(some, resolution=62)


def test_pixels_are_the_image_from_minus_one_to_one(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (255, 0, 51)).save(tmp_path / "a.png")
    (batch, *_) = batches(opened(tmp_path, batch_size=1))
    assert batch["pixels"].dtype == torch.float32
    assert batch["pixels"].shape == (1, 3, 64, 64)
    for channel, value in enumerate((1.0, -1.0, 51 / 127.5 - 1)):
        torch.testing.assert_close(batch["pixels"][0, channel], torch.full((64, 64), value))


def test_repeats_count_in_kohyas_folders_and_in_the_setting(tmp_path: Path) -> None:
    noise(tmp_path / "3_dog" / "a.png", 64, 64)
    noise(tmp_path / "b.png", 64, 64, seed=1)
    data = opened(tmp_path, repeats=2, batch_size=1)
    assert Counter(next(iter(data.buckets(data.train).values()))) == {0: 6, 1: 2}
    assert data.order().steps_per_epoch == 8


# --- captions


def test_captions_are_every_prompt_once(some: Path) -> None:
    (some / "5.txt").write_text("dog 0")
    assert sorted(opened(some).captions()) == [f"dog {i}" for i in range(5)]
    assert opened(some, caption_dropout=0.5).captions()[-1] == ""
    assert opened(some, caption_dropout=0.5, trigger="sks").captions()[-1] == "sks"
    held = opened(some, hold_out=3)
    assert {s.caption for s in held.held_out} <= set(held.captions())


@pytest.mark.parametrize("trigger", [None, "sks"])
def test_dropout_drops_the_wanted_share_and_keeps_the_trigger(tmp_path: Path, trigger: str | None) -> None:
    noise(tmp_path / "a.png", 64, 64, caption="on grass")
    data = opened(tmp_path, resolution=32, batch_size=20, steps=30, caption_dropout=0.2, trigger=trigger)
    prompts = Counter(prompt for batch in batches(data) for prompt in batch["prompts"])
    full, bare = ("sks, on grass", "sks") if trigger else ("on grass", "")
    assert set(prompts) == {full, bare}
    # Binomial: six standard deviations.
    assert abs(prompts[bare] / 600 - 0.2) < 6 * (0.2 * 0.8 / 600) ** 0.5


def test_without_dropout_no_caption_is_dropped_and_with_all_each_is(some: Path) -> None:
    assert all(prompt for batch in batches(opened(some)) for prompt in batch["prompts"])
    assert not any(prompt for batch in batches(opened(some, caption_dropout=1.0)) for prompt in batch["prompts"])


def test_a_batch_tells_its_captions_and_places_in_order(some: Path) -> None:
    data = opened(some, steps=4)
    for step, batch in enumerate(batches(data)):
        assert batch["step"] == step
        assert batch["positions"] == [0, 1]
        assert batch["prompts"] == [f"dog {entry}" for entry in data.order().batch(step)]


# --- flips and crops


def test_half_of_the_samples_are_mirrored(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    plain = batches(opened(tmp_path, batch_size=1, steps=1))[0]["pixels"][0]
    flipped = 0
    for batch in batches(opened(tmp_path, batch_size=20, steps=10, flip=True)):
        for image in batch["pixels"]:
            mirrored = torch.equal(image, plain.flip(-1))
            assert mirrored or torch.equal(image, plain)
            flipped += mirrored
    assert abs(flipped / 200 - 0.5) < 6 * (0.25 / 200) ** 0.5


def test_random_crops_move_and_centre_crops_do_not(tmp_path: Path) -> None:
    noise(tmp_path / "a.png", 96, 64)
    assert opened(tmp_path).bucket(opened(tmp_path).train[0]) == (64, 64)

    def crops(**settings: Any) -> int:
        data = opened(tmp_path, batch_size=4, steps=3, **settings)
        return len({image.numpy().tobytes() for batch in batches(data) for image in batch["pixels"]})

    assert crops() == 1
    assert crops(random_crop=True) > 8


def test_a_random_crop_of_a_cached_latent_is_refused(some: Path) -> None:
    with pytest.raises(UserError, match=r"data\.random_crop: .*data\.cache_latents=false"):
        Folder(path=str(some), random_crop=True)
    Folder(path=str(some), random_crop=True, cache_latents=False)


# --- held out


def test_every_third_image_is_held_out(some: Path) -> None:
    data = opened(some, hold_out=3)
    assert [Path(str(s)).stem for s in data.held_out] == ["2", "5"]
    assert [Path(str(s)).stem for s in data.train] == ["0", "1", "3", "4"]
    found = list(data.val_dataloader())
    assert Counter(p for batch in found for p in batch["prompts"]) == {
        "dog 2": VALIDATION_TIMESTEPS,
        "dog 5": VALIDATION_TIMESTEPS,
    }
    assert equal(found, list(data.val_dataloader()))


def test_nothing_is_held_out_where_nobody_asks(some: Path) -> None:
    assert opened(some).held_out == []
    assert opened(some).val_dataloader() == []


def test_a_validation_folder_is_held_out_and_seen_plainly(some: Path, tmp_path: Path) -> None:
    noise(tmp_path / "other" / "a.png", 64, 64, seed=9, caption="a cat")
    data = opened(some, validation_path=str(tmp_path / "other"), flip=True, caption_dropout=1.0)
    assert len(data.train) == 6
    images = torch.cat([batch["pixels"] for batch in data.val_dataloader()])
    assert len(images) == VALIDATION_TIMESTEPS
    assert all(torch.equal(image, images[0]) for image in images)
    assert {p for batch in data.val_dataloader() for p in batch["prompts"]} == {"a cat"}


def test_held_out_pairs_that_do_not_fit_are_refused(some: Path) -> None:
    with pytest.raises(UserError, match=r"data\.hold_out: .* has 6 images, too few to hold out one in 10"):
        opened(some, hold_out=10)
    with pytest.raises(UserError, match=r"data\.hold_out and data\.validation_path"):
        Folder(path=str(some), hold_out=2, validation_path=str(some))


# --- caches


@pytest.mark.parametrize("flip", [False, True])
def test_cached_latents_are_the_ones_that_would_be_encoded(some: Path, tmp_path: Path, flip: bool) -> None:
    noise(some / "wide.png", 96, 48, seed=1)
    plain = opened(some, flip=flip, caption_dropout=0.3)
    cached = opened(some, flip=flip, caption_dropout=0.3, cache_latents=True, cache_text=True)
    cached.prepare(encoders(tmp_path / "cache"))
    for one, other in zip(batches(plain), batches(cached), strict=True):
        assert "pixels" not in other
        assert other["prompts"] == one["prompts"]
        assert other["positions"] == one["positions"]
        assert torch.equal(other["moments"], encode(one["pixels"]))
        assert torch.equal(other["text"], text(one["prompts"]))


def test_a_part_that_is_trained_or_not_to_be_cached_is_not(some: Path, tmp_path: Path) -> None:
    data = opened(some, cache_latents=True, cache_text=True)
    data.prepare(encoders(tmp_path / "cache", images=None, words=None))
    assert {"pixels", "prompts"} < batches(data)[0].keys()
    data = opened(some)
    data.prepare(encoders(tmp_path / "cache"))
    assert not {"moments", "text"} & batches(data)[0].keys()
    assert not (tmp_path / "cache").exists()


def moments(path: Path, cache: Path, **settings: Any) -> dict[str, bytes]:
    """Each prompt's moments."""
    data = opened(path, cache_latents=True, steps=12, **settings)
    data.prepare(encoders(cache))
    return {p: m.numpy().tobytes() for b in batches(data) for p, m in zip(b["prompts"], b["moments"], strict=True)}


def test_an_edited_image_never_meets_its_old_latents(some: Path, tmp_path: Path) -> None:
    file = some / "0.png"
    before, state = moments(some, tmp_path / "cache"), file.stat()
    noise(file, 64, 64, seed=100)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # name and time of change say nothing
    after = moments(some, tmp_path / "cache")
    assert after["dog 0"] != before["dog 0"]
    assert {k: v for k, v in after.items() if k != "dog 0"} == {k: v for k, v in before.items() if k != "dog 0"}


def test_the_content_is_the_key_and_not_the_name(some: Path, tmp_path: Path) -> None:
    calls = []

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return encode(images)

    def fill(path: Path, images_hash: str = "vae", **settings: Any) -> int:
        calls.clear()
        data = opened(path, cache_latents=True, **settings)
        data.prepare(encoders(tmp_path / "cache", counted, images_hash))
        batches(data)
        return sum(calls)

    assert fill(some) == 6
    assert fill(some) == 0
    some.rename(tmp_path / "renamed")
    renamed = tmp_path / "renamed"
    (renamed / "0.png").rename(renamed / "zero.png")
    assert fill(renamed) == 0
    assert fill(renamed, flip=True) == 6  # the mirrored ones alone
    assert fill(renamed, resolution=32) == 6
    assert fill(renamed, images_hash="another vae") == 6


def test_an_encoder_that_overflows_fails_and_names_the_image(some: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "white").save(some / "white.png")

    def overflowing(images: Tensor) -> Tensor:
        out = encode(images)
        out[images.flatten(1).min(1).values == 1] = float("nan")
        return out

    data = opened(some, cache_latents=True)
    with pytest.raises(UserError, match=r"some/white\.png: .*not finite"):
        data.prepare(encoders(tmp_path / "cache", overflowing))


# --- loaders


@pytest.mark.parametrize("cached", [False, True])
def test_two_workers_give_the_same_batches_as_none(some: Path, tmp_path: Path, cached: bool) -> None:
    def load(workers: int) -> list[dict[str, Any]]:
        data = opened(
            some, workers=workers, flip=True, caption_dropout=0.5, cache_latents=cached, random_crop=not cached
        )
        data.prepare(encoders(tmp_path / "cache"))
        return batches(data)

    assert equal(load(2), load(0))


def test_a_loader_that_starts_later_gives_the_rest(some: Path) -> None:
    settings: dict[str, Any] = {"flip": True, "random_crop": True, "caption_dropout": 0.5, "steps": 8}
    whole = batches(opened(some, **settings, accumulation=2))
    later = opened(some, **settings, accumulation=2, start=3)
    assert len(later.train_dataloader()) == len(whole) == 16
    assert equal(batches(later), whole[6:])


def test_the_seed_decides(some: Path) -> None:
    def load(seed: int) -> list[dict[str, Any]]:
        return batches(opened(some, flip=True, random_crop=True, seed=seed))

    assert equal(load(1), load(1))
    assert not equal(load(1), load(2))


def test_a_source_must_say_what_its_images_are() -> None:
    with pytest.raises(TypeError, match="ImageDataModule.*read"):
        ImageDataModule().open(64, 8)


def test_limit_trains_on_the_first_images_alone(some: Path) -> None:
    data = opened(some, limit=2, steps=5)
    assert {prompt for batch in batches(data) for prompt in batch["prompts"]} == {"dog 0", "dog 1"}


def test_with_another_backbone_its_side_counts(some: Path) -> None:
    data, own = Folder(path=str(some), prompt="a dog"), Folder(path=str(some), prompt="a dog", resolution=64)
    for side, factor in ((64, 4), (512, 8)):
        for folder in (data, own):
            folder.open(side, factor)
        assert (data.resolution, data.factor) == (side, factor)
        assert (own.resolution, own.factor) == (64, factor)


def test_edited_masks_and_held_out_images_are_another_run(some: Path) -> None:
    def fingerprint(**settings: Any) -> str:
        return opened(some, **settings).fingerprint

    for image in sorted(some.rglob("*.png")):
        Image.new("L", Image.open(image).size, 255).save(image.with_suffix(".mask.png"))
    plain, masked, held = fingerprint(), fingerprint(masked=True), fingerprint(hold_out=2)
    assert (fingerprint(masked=True), fingerprint(hold_out=2)) == (masked, held)
    mask = sorted(some.rglob("*.mask.png"))[0]
    Image.new("L", Image.open(mask).size, 0).save(mask)
    assert fingerprint() == plain
    assert fingerprint(masked=True) != masked
    data = opened(some, hold_out=2)
    path = data.held_out[0].path
    Image.new("RGB", Image.open(path).size).save(path)
    assert fingerprint(hold_out=2) != held


def test_previews_show_the_images_own_prompts(some: Path) -> None:
    data = opened(some, caption_dropout=0.5, class_prompt="a cat", hold_out=2)
    data.draw_class(encoders(some.parent / "cache"))
    assert {"", "a cat"} <= set(data.captions())
    shown = [one.prompt for one in preview_prompts(data, None, 100, (64, 64))]
    assert shown == data.shown() == list(dict.fromkeys(s.caption for s in data.train))
