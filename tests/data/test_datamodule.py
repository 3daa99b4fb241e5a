"""Data module for a folder of images: buckets, captions, dropout, flips, crops and caches."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from image_data import batches, encode, encoders, equal, noise, opened, text
from sdtune.data import Folder, ImageDataModule, datamodule, indexing, table
from sdtune.data.control.edges import Canny
from sdtune.data.datamodule import VALIDATION_TIMESTEPS
from sdtune.data.previews import preview_prompts
from sdtune.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of six images of 64x64 pixels."""
    for i in range(6):
        noise(tmp_path / "images" / f"{i}.png", 64, 64, seed=i, caption=f"dog {i}")
    return tmp_path / "images"


# --- buckets


def test_images_of_two_shapes_are_trained_in_separate_buckets(tmp_path: Path) -> None:
    for i in range(3):
        noise(tmp_path / f"tall{i}.png", 512, 768, seed=i)
        noise(tmp_path / f"wide{i}.png", 640, 384, seed=i)
    data = opened(tmp_path, side=512, steps=4)
    buckets = {size: data.buckets.entries(number).tolist() for number, size in enumerate(data.buckets.sizes)}
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


def test_resolution_is_the_configured_one_or_that_of_the_backbone(folder: Path) -> None:
    assert batches(opened(folder, side=64))[0]["pixels"].shape == (2, 3, 64, 64)
    assert batches(opened(folder, side=64, resolution=32))[0]["pixels"].shape == (2, 3, 32, 32)
    with pytest.raises(UserError, match=r"data\.resolution: 62 is not a multiple of 4"):
        opened(folder, resolution=62)


def test_pixels_are_scaled_to_minus_one_to_one(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (255, 0, 51)).save(tmp_path / "a.png")
    (batch, *_) = batches(opened(tmp_path, batch_size=1))
    assert batch["pixels"].dtype == torch.float32
    assert batch["pixels"].shape == (1, 3, 64, 64)
    for channel, value in enumerate((1.0, -1.0, 51 / 127.5 - 1)):
        torch.testing.assert_close(batch["pixels"][0, channel], torch.full((64, 64), value))


def test_repeats_of_kohya_folders_and_of_the_setting_multiply(tmp_path: Path) -> None:
    noise(tmp_path / "3_dog" / "a.png", 64, 64)
    noise(tmp_path / "b.png", 64, 64, seed=1)
    data = opened(tmp_path, repeats=2, batch_size=1)
    assert Counter(data.buckets.fixed[0].tolist()) == {0: 6, 1: 2}
    assert data.order().steps_per_epoch == 8


# --- captions


def test_all_prompts_contain_every_prompt_once(folder: Path) -> None:
    (folder / "5.txt").write_text("dog 0", encoding="utf-8")
    assert sorted(opened(folder).all_prompts()) == [f"dog {i}" for i in range(5)]
    assert list(opened(folder, caption_dropout=0.5).all_prompts())[-1] == ""
    assert list(opened(folder, caption_dropout=0.5, trigger="sks").all_prompts())[-1] == "sks"
    held = opened(folder, hold_out=3)
    assert {s.caption for s in held.held_out} <= set(held.all_prompts())


@pytest.mark.parametrize("trigger", [None, "sks"])
def test_dropout_has_the_configured_rate_and_keeps_the_trigger(tmp_path: Path, trigger: str | None) -> None:
    noise(tmp_path / "a.png", 64, 64, caption="on grass")
    data = opened(tmp_path, resolution=32, batch_size=20, steps=30, caption_dropout=0.2, trigger=trigger)
    prompts = Counter(prompt for batch in batches(data) for prompt in batch["prompts"])
    full, dropped = ("sks, on grass", "sks") if trigger else ("on grass", "")
    assert set(prompts) == {full, dropped}
    # Six standard deviations of the binomial distribution.
    assert abs(prompts[dropped] / 600 - 0.2) < 6 * (0.2 * 0.8 / 600) ** 0.5


def test_dropout_rates_of_zero_and_one_drop_no_and_all_captions(folder: Path) -> None:
    assert all(prompt for batch in batches(opened(folder)) for prompt in batch["prompts"])
    assert not any(prompt for batch in batches(opened(folder, caption_dropout=1.0)) for prompt in batch["prompts"])


def test_batch_contains_its_step_positions_and_captions_in_order(folder: Path) -> None:
    data = opened(folder, steps=4)
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


def test_random_crops_differ_and_center_crops_are_equal(tmp_path: Path) -> None:
    noise(tmp_path / "a.png", 96, 64)
    assert opened(tmp_path).bucket(opened(tmp_path).train[0]) == (64, 64)

    def crops(**settings: Any) -> int:
        data = opened(tmp_path, batch_size=4, steps=3, **settings)
        return len({image.numpy().tobytes() for batch in batches(data) for image in batch["pixels"]})

    assert crops() == 1
    assert crops(random_crop=True) > 8


def test_random_crop_with_cached_latents_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.random_crop: .*data\.cache_latents=false"):
        Folder(path=str(folder), random_crop=True)
    Folder(path=str(folder), random_crop=True, cache_latents=False)


# --- held-out images


def test_every_third_image_is_held_out(folder: Path) -> None:
    data = opened(folder, hold_out=3)
    assert [Path(str(s)).stem for s in data.held_out] == ["2", "5"]
    assert [Path(str(s)).stem for s in data.train] == ["0", "1", "3", "4"]
    validation = list(data.val_dataloader())
    assert Counter(p for batch in validation for p in batch["prompts"]) == {
        "dog 2": VALIDATION_TIMESTEPS,
        "dog 5": VALIDATION_TIMESTEPS,
    }
    assert equal(validation, list(data.val_dataloader()))


def test_no_image_is_held_out_by_default(folder: Path) -> None:
    assert not opened(folder).held_out
    assert opened(folder).val_dataloader() == []


def test_validation_folder_is_used_without_flips_and_dropout(folder: Path, tmp_path: Path) -> None:
    noise(tmp_path / "other" / "a.png", 64, 64, seed=9, caption="a cat")
    data = opened(folder, validation_path=str(tmp_path / "other"), flip=True, caption_dropout=1.0)
    assert len(data.train) == 6
    images = torch.cat([batch["pixels"] for batch in data.val_dataloader()])
    assert len(images) == VALIDATION_TIMESTEPS
    assert all(torch.equal(image, images[0]) for image in images)
    assert {p for batch in data.val_dataloader() for p in batch["prompts"]} == {"a cat"}


def test_invalid_hold_out_settings_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.hold_out: .* has 6 images, too few to hold out one in 10"):
        opened(folder, hold_out=10)
    with pytest.raises(UserError, match=r"^data\.hold_out: cannot be combined with data\.validation_path"):
        Folder(path=str(folder), hold_out=2, validation_path=str(folder))


# --- caches


@pytest.mark.parametrize("flip", [False, True])
def test_cached_latents_and_texts_equal_encoder_outputs(folder: Path, tmp_path: Path, flip: bool) -> None:
    noise(folder / "wide.png", 96, 48, seed=1)
    plain = opened(folder, flip=flip, caption_dropout=0.3)
    cached = opened(folder, flip=flip, caption_dropout=0.3, cache_latents=True, cache_text=True)
    cached.prepare(encoders(tmp_path / "cache"))
    for one, other in zip(batches(plain), batches(cached), strict=True):
        assert "pixels" not in other
        assert other["prompts"] == one["prompts"]
        assert other["positions"] == one["positions"]
        assert torch.equal(other["moments"], encode(one["pixels"]))
        assert torch.equal(other["conditioning"].states, text(one["prompts"]).states)


def test_trained_parts_and_turned_off_caches_are_not_cached(folder: Path, tmp_path: Path) -> None:
    data = opened(folder, cache_latents=True, cache_text=True)
    data.prepare(encoders(tmp_path / "cache", images=None, words=None))
    assert {"pixels", "prompts"} < batches(data)[0].keys()
    data = opened(folder)
    data.prepare(encoders(tmp_path / "cache"))
    assert not {"moments", "conditioning"} & batches(data)[0].keys()
    assert not (tmp_path / "cache").exists()


def moments(path: Path, cache: Path, **settings: Any) -> dict[str, bytes]:
    """Latent moments by prompt."""
    data = opened(path, cache_latents=True, steps=12, **settings)
    data.prepare(encoders(cache))
    return {p: m.numpy().tobytes() for b in batches(data) for p, m in zip(b["prompts"], b["moments"], strict=True)}


def test_edited_image_is_encoded_again(folder: Path, tmp_path: Path) -> None:
    file = folder / "0.png"
    original, status = moments(folder, tmp_path / "cache"), file.stat()
    noise(file, 64, 64, seed=100)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same name and modification time
    edited = moments(folder, tmp_path / "cache")
    assert edited["dog 0"] != original["dog 0"]
    assert {k: v for k, v in edited.items() if k != "dog 0"} == {k: v for k, v in original.items() if k != "dog 0"}


def test_latent_cache_is_keyed_by_content_not_by_name(folder: Path, tmp_path: Path) -> None:
    calls = []

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return encode(images)

    def fill(path: Path, vae_key: str = "vae", **settings: Any) -> int:
        calls.clear()
        data = opened(path, cache_latents=True, **settings)
        data.prepare(encoders(tmp_path / "cache", counted, vae_key))
        batches(data)
        return sum(calls)

    assert fill(folder) == 6
    assert fill(folder) == 0
    folder.rename(tmp_path / "renamed")
    renamed = tmp_path / "renamed"
    (renamed / "0.png").rename(renamed / "zero.png")
    assert fill(renamed) == 0
    assert fill(renamed, flip=True) == 12  # the batches of the mirrored images contain the others
    assert fill(renamed, resolution=32) == 6
    assert fill(renamed, vae_key="another vae") == 6


def test_overflow_of_the_encoder_is_refused_with_the_image_name(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "white").save(folder / "white.png")

    def overflowing(images: Tensor) -> Tensor:
        out = encode(images)
        out[images.flatten(1).min(1).values == 1] = float("nan")
        return out

    data = opened(folder, cache_latents=True)
    with pytest.raises(UserError, match=r"images/white\.png: .*not finite"):
        data.prepare(encoders(tmp_path / "cache", overflowing))


# --- loaders


@pytest.mark.parametrize("cached", [False, True])
def test_two_workers_give_the_same_batches_as_none(folder: Path, tmp_path: Path, cached: bool) -> None:
    def load(workers: int) -> list[dict[str, Any]]:
        data = opened(
            folder, workers=workers, flip=True, caption_dropout=0.5, cache_latents=cached, random_crop=not cached
        )
        data.prepare(encoders(tmp_path / "cache"))
        return batches(data)

    assert equal(load(2), load(0))


@pytest.mark.parametrize(
    ("device", "cores", "devices", "settings", "expected"),
    [
        ("cpu", 16, 1, {}, 0),
        ("cuda", 16, 1, {}, 4),
        ("cuda", 8, 4, {}, 1),
        ("cuda", 1, 1, {}, 0),
        ("cuda", 16, 1, {"cache_latents": True}, 0),
        ("cuda", 16, 1, {"cache_latents": True, "control": Canny()}, 4),
        ("cuda", 16, 1, {"cache_latents": True, "mask": "alpha"}, 4),
        ("cuda", 16, 1, {"cache_latents": True, "workers": 2}, 2),
        ("cuda", 16, 1, {"resolution": 512}, 3),  # 2 * 2 * 3 * 4 * 512**2 bytes per process, and 48 MiB are free
        ("cuda", 16, 1, {"resolution": 1024}, 0),
        ("cpu", 16, 1, {"workers": 1}, 1),
    ],
)
def test_images_decoded_in_the_steps_on_a_gpu_are_loaded_by_workers(
    device: str,
    cores: int,
    devices: int,
    settings: dict[str, Any],
    expected: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datamodule, "usable_cores", lambda: cores)
    monkeypatch.setattr(datamodule.shutil, "disk_usage", lambda path: SimpleNamespace(free=48 * 2**20))
    data = opened(folder, **settings)
    trainer: Any = data.trainer
    trainer.strategy, trainer.num_devices = SimpleNamespace(root_device=torch.device(device)), devices
    data.prepare(encoders(tmp_path / "cache"))
    assert data.train_dataloader().num_workers == expected
    monkeypatch.setattr(datamodule.multiprocessing, "get_start_method", lambda: "spawn")
    assert data.train_dataloader().num_workers == settings.get("workers", 0)


def test_loader_that_starts_later_yields_the_remaining_batches(folder: Path) -> None:
    settings: dict[str, Any] = {"flip": True, "random_crop": True, "caption_dropout": 0.5, "steps": 8}
    full_run = batches(opened(folder, **settings, accumulation=2))
    resumed = opened(folder, **settings, accumulation=2, start=3)
    assert len(resumed.train_dataloader()) == len(full_run) == 16
    assert equal(batches(resumed), full_run[6:])


def test_seed_determines_the_batches(folder: Path) -> None:
    def load(seed: int) -> list[dict[str, Any]]:
        return batches(opened(folder, flip=True, random_crop=True, seed=seed))

    assert equal(load(1), load(1))
    assert not equal(load(1), load(2))


def test_data_module_without_read_method_is_refused() -> None:
    with pytest.raises(TypeError, match="ImageDataModule.*read"):
        ImageDataModule().open(64, 8)


def test_limit_restricts_training_to_the_first_images(folder: Path) -> None:
    data = opened(folder, limit=2, steps=5)
    assert {prompt for batch in batches(data) for prompt in batch["prompts"]} == {"dog 0", "dog 1"}


def test_resolution_follows_a_new_backbone_unless_configured(folder: Path) -> None:
    default, configured = Folder(path=str(folder), prompt="dog"), Folder(path=str(folder), prompt="dog", resolution=64)
    for side, factor in ((64, 4), (512, 8)):
        for data in (default, configured):
            data.open(side, factor)
        assert (default.side, default.factor) == (side, factor)
        assert (configured.side, configured.factor) == (64, factor)


def test_edited_masks_and_held_out_images_change_the_fingerprint(folder: Path) -> None:
    def fingerprint(**settings: Any) -> str:
        return opened(folder, **settings).fingerprint

    for image in sorted(folder.rglob("*.png")):
        Image.new("L", Image.open(image).size, 255).save(image.with_suffix(".mask.png"))
    plain, masked, held = fingerprint(), fingerprint(mask="file"), fingerprint(hold_out=2)
    assert (fingerprint(mask="file"), fingerprint(hold_out=2)) == (masked, held)
    mask = sorted(folder.rglob("*.mask.png"))[0]
    Image.new("L", Image.open(mask).size, 0).save(mask)
    assert fingerprint() == plain
    assert fingerprint(mask="file") != masked
    data = opened(folder, hold_out=2)
    path = Path(str(data.held_out[0]))
    Image.new("RGB", Image.open(path).size).save(path)
    assert fingerprint(hold_out=2) != held


def test_preview_prompts_are_those_of_the_training_images(folder: Path) -> None:
    data = opened(folder, caption_dropout=0.5, class_prompt="a cat", hold_out=2)
    data.generate_class_images(encoders(folder.parent / "cache"))
    assert {"", "a cat"} <= set(data.all_prompts())
    prompts = [preview.prompt for preview in preview_prompts(data, None, 100, (64, 64))]
    assert prompts == list(data.training_prompts()) == list(dict.fromkeys(s.caption for s in data.train))


# --- images that become unreadable


def test_unreadable_image_is_replaced_by_one_of_its_size(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, stopping = opened(folder, steps=9, damaged="skip"), opened(folder, steps=9)
    intact = batches(data)
    broken = Path(str(data.train[2]))
    broken.write_bytes(b"text")
    found = batches(data)
    assert equal(found, batches(opened_again(data)))
    changed = [step for step, (one, other) in enumerate(zip(intact, found, strict=True)) if not equal([one], [other])]
    uses = [step for step in range(9) if 2 in data.order().batch(step)]
    assert changed == uses
    assert all(one["pixels"].shape == other["pixels"].shape for one, other in zip(intact, found, strict=True))
    assert f"{broken} has changed since it was indexed" in caplog.text
    assert "another image replaces it" in caplog.text
    with pytest.raises(UserError, match=r"^data\.path: .* has changed since it was indexed; run sdtune index again"):
        batches(stopping)


def opened_again(data: ImageDataModule) -> ImageDataModule:
    data._forget()
    return data


def test_files_are_listed_once_and_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = indexing.read_image
    monkeypatch.setattr(indexing, "read_image", lambda i, r: (read.append(str(i.place)), original(i, r))[1])
    first = opened(folder)
    count = len(read)
    assert count == len(first.train)
    mapped: list[Path] = []
    init = table.MappedTable.__init__
    monkeypatch.setattr(
        table.MappedTable,
        "__init__",
        lambda self, file, key="data.path": (mapped.append(file), init(self, file, key))[1],
    )
    for prompt in ("x", "y", "z"):  # jobs of a sweep
        assert opened(folder, prompt=prompt).train.table is first.train.table  # type: ignore[attr-defined]
    assert (len(read), mapped) == (count, [])
    opened(folder, rehash=True)
    assert len(read) == 2 * count


def test_limits_read_only_what_they_need(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = indexing.read_image
    monkeypatch.setattr(indexing, "read_image", lambda i, r: (read.append(str(i.place)), original(i, r))[1])
    assert len(opened(folder, limit=2).train) == len(read) == 2
    read.clear()
    data = opened(folder, limit=2, hold_out=3, validation_limit=1)
    assert (len(data.train), len(data.held_out), len(read)) == (2, 1, 1), "two of three images are known"
    whole = opened(folder, hold_out=3)
    assert [str(s) for s in data.train] == [str(s) for s in whole.train][:2]
    assert [str(s) for s in data.held_out] == [str(s) for s in whole.held_out][:1]
