"""Control maps have the crop, size and flip of their images, for every source of maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from drawings import drawing, save_drawings
from image_data import batches, encoders, equal, noise, opened
from sdtune.data import Folder
from sdtune.data.control.base import Control
from sdtune.data.control.edges import Canny, Scribble
from sdtune.data.control.paired import Paired
from sdtune.data.previews import preview_prompts
from sdtune.data.samples import SampleSequence
from sdtune.errors import UserError

COMPUTED = [Canny(), Scribble()]


def samples(folder: Path, control: Control | None = None) -> SampleSequence:
    data = Folder(path=str(folder), prompt="a dog", control=control)
    data.open(32, 4)
    return data.train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_drawings(tmp_path / "images", 4, 64, 64)


def paired(folder: Path, scale: int = 1, **settings: Any) -> Paired:
    """Source whose maps are copies of the images, so that a map must equal its image."""
    target = folder.parent / "maps"
    target.mkdir(exist_ok=True)
    for file in folder.glob("*.png"):
        image = Image.open(file)
        size = (image.width * scale, image.height * scale)
        image.resize(size, Image.Resampling.NEAREST).save(target / file.name)
    return Paired(str(target), **settings)


# --- flips and crops


@pytest.mark.parametrize("control", COMPUTED, ids=lambda c: type(c).__name__)
def test_map_of_flipped_image_is_the_exact_mirror_image(folder: Path, control: Control) -> None:
    for sample in samples(folder):
        plain, flipped = (control.map(sample, (48, 64), (0.3, 0.5), flip) for flip in (False, True))
        assert plain.shape == (64, 48, 3)
        assert plain.dtype == np.uint8
        assert set(np.unique(plain)) == {0, 255}
        assert np.array_equal(flipped, plain[:, ::-1])
        assert not np.array_equal(flipped, plain)


def test_computed_map_is_the_map_of_the_cropped_image(folder: Path) -> None:
    sample = samples(folder)[1]
    for offset in ((0.0, 0.5), (0.9, 0.5)):
        crop = sample.pixels((32, 64), offset, False)
        assert np.array_equal(Canny().map(sample, (32, 64), offset), Canny().extract(crop))


@pytest.mark.parametrize("kind", [Canny, Scribble])
def test_edge_map_is_computed_once_and_read_from_its_file(
    kind: type[Canny | Scribble], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = folder.parent / "cache"
    monkeypatch.setenv("SDTUNE_CACHE", str(cache))
    sample = samples(folder)[1]
    first = kind().map(sample, (48, 64))
    for other_map in (kind(low=900, high=1500).map(sample, (48, 64)), kind().map(sample, (64, 64))):
        assert not np.array_equal(other_map, first)
    files = sorted((cache / "control").rglob("*.png"))
    assert len(files) == 3
    kind().map(sample, (48, 64), (0.3, 0.5))  # a random crop
    assert sorted((cache / "control").rglob("*.png")) == files
    original = kind.extract
    monkeypatch.setattr(kind, "extract", lambda self, pixels: pytest.fail("computed again"))
    assert np.array_equal(kind().map(sample, (48, 64)), first)
    assert np.array_equal(kind().map(sample, (48, 64), flip=True), first[:, ::-1])
    monkeypatch.setattr(kind, "extract", original)
    for file in files:
        file.write_bytes(file.read_bytes()[:60])
    assert np.array_equal(kind().map(sample, (48, 64)), first)
    assert len([file for file in files if file.stat().st_size > 60]) == 1


def test_map_of_a_users_subclass_is_not_cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Inverted(Canny):
        """Canny edges, black on white."""

        def extract(self, pixels: np.ndarray) -> np.ndarray:
            return 255 - super().extract(pixels)

    monkeypatch.setenv("SDTUNE_CACHE", str(folder.parent / "cache"))
    sample = samples(folder)[1]
    plain = Canny().map(sample, (48, 64))
    for _ in range(2):
        assert np.array_equal(Inverted().map(sample, (48, 64)), 255 - plain)
    assert len(list((folder.parent / "cache").rglob("*.png"))) == 1


def test_edges_are_only_on_the_border_of_a_rectangle() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:24, 10:20] = 255
    edges = Canny().extract(pixels)[..., 0] > 0
    border = np.zeros((32, 32), bool)
    border[7:25, 9:21] = True
    border[9:23, 11:19] = False
    assert edges.any()
    assert not (edges & ~border).any()
    thick = Scribble().extract(pixels)[..., 0] > 0
    assert thick.sum() > 2 * edges.sum()
    assert not Canny(900, 1500).extract(drawing(0))[..., 0].all()


def test_colors_of_equal_brightness_have_an_edge() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8, 0], pixels[:, 8:, 2] = 200, 200
    assert Canny().extract(pixels).any()


def test_thresholds_in_wrong_order_are_refused() -> None:
    for kind in (Canny, Scribble):
        message = r"^data\.control\.low: 300 is above data\.control\.high \(200\); set at most 200$"
        with pytest.raises(UserError, match=message):
            kind(low=300, high=200)


@pytest.mark.parametrize("settings", [{"random_crop": True}, {"flip": True}, {"flip": True, "random_crop": True}])
def test_maps_in_batches_match_the_pixels(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):  # gradients: all resampling filters agree on them, and all of their crops differ
        x, y = np.meshgrid(np.arange(96), np.arange(64))
        pixels = np.stack([x * 2 + 20 * i, y * 3, 250 - x * 2], -1).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    data = opened(tmp_path / "images", control=paired(tmp_path / "images"), batch_size=3, steps=5, **settings)
    for batch in batches(data):
        assert batch["conditions"]["control"].dtype == torch.float32
        assert batch["conditions"]["control"].min() >= 0
        assert batch["conditions"]["control"].max() <= 1
        # Different crops differ by 1.5.
        torch.testing.assert_close(batch["conditions"]["control"] * 2 - 1, batch["pixels"], rtol=0, atol=0.02)


def test_maps_work_with_cached_latents_and_workers(folder: Path, tmp_path: Path) -> None:
    plain = opened(folder, control=Canny(), flip=True)
    cached = opened(folder, control=Canny(), flip=True, cache_latents=True, workers=1)
    cached.prepare(encoders(tmp_path / "cache"))
    for one, other in zip(batches(plain), batches(cached), strict=True):
        assert "moments" in other
        assert torch.equal(one["conditions"]["control"], other["conditions"]["control"])
        for pixels, control in zip(one["pixels"], one["conditions"]["control"], strict=True):
            flipped = [Canny().map(s, (64, 64), flip=True) for s in plain.train]
            unflipped = [Canny().map(s, (64, 64)) for s in plain.train]
            map_pixels = (control * 255).permute(1, 2, 0).byte().numpy()
            assert len([m for m in (*flipped, *unflipped) if np.array_equal(m, map_pixels)]) == 1
            assert pixels.shape == control.shape


def test_control_maps_do_not_change_the_other_inputs(folder: Path) -> None:
    assert all(not batch["conditions"] for batch in batches(opened(folder)))
    one, other = batches(opened(folder)), batches(opened(folder, control=Canny()))
    for batch in other:
        del batch["conditions"]["control"]
    assert equal(one, other)


# --- paired maps


def test_larger_map_is_scaled_to_the_crop(folder: Path) -> None:
    enlarged = paired(folder, 3, resample="nearest")
    sample = samples(folder, enlarged)[0]
    image = sample.pixels((64, 64), (0.5, 0.5), False)
    assert np.array_equal(enlarged.map(sample, (64, 64)), image)


def test_nearest_resampling_does_not_blend_classes(folder: Path) -> None:
    colors = {tuple(c) for c in drawing(0, 64, 64).reshape(-1, 3).tolist()}
    for resample in ("nearest", "bilinear"):
        control = paired(folder, 3, resample=resample)
        sample = samples(folder, control)[0]
        map_colors = {tuple(c) for c in control.map(sample, (40, 40)).reshape(-1, 3).tolist()}
        assert (map_colors <= colors) == (resample == "nearest")


def test_maps_are_found_by_name_and_by_sub_folder(tmp_path: Path) -> None:
    for i, name in enumerate(("a/x", "b/x", "c/y")):
        noise(tmp_path / "images" / f"{name}.jpg", 64, 64, seed=i)
    for i, name in enumerate(("a/x.png", "b/x.webp", "y.png")):
        noise(tmp_path / "maps" / name, 64, 64, seed=10 + i)
    control = Paired(str(tmp_path / "maps"))
    images = samples(tmp_path / "images", control)
    maps = [control.map(s, (64, 64)).tobytes() for s in images]
    assert len(set(maps)) == 3
    assert maps[2] == np.asarray(Image.open(tmp_path / "maps" / "y.png").convert("RGB")).tobytes()


def test_one_map_for_two_images_is_refused(tmp_path: Path) -> None:
    for i, name in enumerate(("images/a/x.png", "images/b/x.png", "maps/x.png")):
        noise(tmp_path / name, 64, 64, seed=i)
    with pytest.raises(UserError, match=r"maps/x\.png is the map of .*a/x\.png and of .*b/x\.png; put the maps into"):
        samples(tmp_path / "images", Paired(str(tmp_path / "maps")))


def test_invalid_maps_are_refused_with_their_file_name(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, control: Paired | None = None) -> None:
        with pytest.raises(UserError, match=match):
            opened(folder, control=control or Paired(str(maps)))

    maps = folder.parent / "maps"
    refused(r"^data\.control\.path: .*/maps is not a folder")
    paired(folder)
    opened(folder, control=Paired(str(maps)))
    (maps / "2.png").rename(maps / "two.png")
    refused(r"^data\.control\.path: no map for .*/2\.png; add 2\.png to .*/maps$")
    Image.new("RGB", (64, 48)).save(maps / "2.png")
    refused(r"^data\.control\.path: .*/maps/2\.png is 64x48 pixels but its image is 64x64")
    (maps / "2.png").write_bytes((maps / "1.png").read_bytes()[:80])
    refused(r"^data\.control\.path: .*/maps/2\.png is not a readable image")
    Image.new("RGB", (64, 64)).save(maps / "2.png")
    Image.new("RGB", (64, 64)).save(maps / "2.webp")
    refused(r"^data\.control\.path: .*/2\.webp and 2\.png have the same name")


def test_edited_map_changes_the_fingerprint(folder: Path) -> None:
    def fingerprint(control: Control | None) -> str:
        return opened(folder, control=control).fingerprint

    original = fingerprint(paired(folder))
    assert fingerprint(paired(folder)) == original
    Image.new("RGB", (64, 64)).save(folder.parent / "maps" / "0.png")
    assert fingerprint(Paired(str(folder.parent / "maps"))) != original
    assert fingerprint(None) == fingerprint(Canny())  # the run's config covers the settings


# --- previews


def test_preview_has_the_map_of_the_image_with_its_caption(folder: Path) -> None:
    data = opened(folder, control=Canny(), hold_out=2)
    default = preview_prompts(data, None, 4, (32, 32))
    assert [preview.prompt for preview in default] == [s.caption for s in data.held_out]
    for preview, sample in zip(default, data.held_out, strict=True):
        assert np.array_equal(preview.conditions["control"], Canny().map(sample, (32, 32)))
    custom = preview_prompts(data, ["a", "b", "c"], 4, (32, 32))
    assert [preview.prompt for preview in custom] == ["a", "b", "c"]
    assert np.array_equal(custom[2].conditions["control"], default[0].conditions["control"])
    without_maps = preview_prompts(opened(folder), None, 2, (32, 32))
    assert [(one.prompt, one.conditions) for one in without_maps] == [
        ("picture number 0", {}),
        ("picture number 1", {}),
    ]
