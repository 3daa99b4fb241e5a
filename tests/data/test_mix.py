"""Mixes: shares of an epoch, batches, loss weights and settings of several sources of images."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from image_data import batches, encoders, equal, noise, opened
from sdtune.config.sources import build_data, check_data, with_targets
from sdtune.data import Folder, ImageDataModule, Mix
from sdtune.data.captions import Captions
from sdtune.data.control.edges import Canny
from sdtune.data.control.paired import Paired
from sdtune.data.datamodule import VALIDATION_TIMESTEPS
from sdtune.errors import UserError


def folder(path: Path, name: str, sizes: list[tuple[int, int]]) -> str:
    for number, (width, height) in enumerate(sizes):
        noise(path / name / f"{number:02d}.png", width, height, seed=sum(map(ord, name)) + number)
    return str(path / name)


def mixed(sources: dict[str, ImageDataModule], side: int = 64, steps: int = 12, **settings: Any) -> Mix:
    data = Mix(sources=sources, **{"cache_latents": False, "cache_text": False, "batch_size": 2, **settings})
    data.open(side, 4)
    data.trainer = opened(Path(str(next(iter(sources.values())).path)), steps=steps).trainer  # type: ignore[attr-defined]
    return data


def source(path: str, **settings: Any) -> Folder:
    return Folder(path=path, **{"prompt": f"a {Path(path).name}", **settings})


def uses(data: ImageDataModule, epoch: int = 0) -> Counter[str]:
    """How often the images of each source are used in an epoch."""
    order, names = data.order(), [*data.parts]
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return Counter(names[int(data.entries.sources[entry])] for step in steps for entry in order.batch(step))


# --- shares of an epoch


def test_one_source_alone_gives_the_batches_of_its_own_data_module(tmp_path: Path) -> None:
    path = folder(tmp_path, "dog", [(64, 64), (96, 64), (64, 96), (64, 64), (80, 64)])
    settings: dict[str, Any] = {"flip": True, "caption_dropout": 0.3, "repeats": 2, "hold_out": 3}
    alone = opened(Path(path), steps=12, **settings, prompt="a dog")
    data = mixed({"dog": source(path, **settings)})
    assert equal(batches(data), batches(alone))
    assert equal(list(data.val_dataloader()), list(alone.val_dataloader()))


def test_sources_are_used_as_often_as_their_repeats(tmp_path: Path) -> None:
    sources = {
        "a": source(folder(tmp_path, "a", [(64, 64)] * 3), repeats=4),
        "b": source(folder(tmp_path, "b", [(64, 64)] * 5)),
    }
    assert uses(mixed(sources, batch_size=1)) == {"a": 12, "b": 5}


def test_sources_are_used_as_often_as_their_weights_ask(tmp_path: Path) -> None:
    sizes = [(64, 64), (96, 64), (64, 96)]
    sources = {
        "largest": source(folder(tmp_path, "a", [(64, 64)] * 20)),
        "half": source(folder(tmp_path, "b", sizes * 2), weight=0.5),
        "more": source(folder(tmp_path, "c", sizes), weight=1.25),
    }
    data = mixed(sources, side=96, batch_size=1)
    assert uses(data) == uses(data, 1) == {"largest": 20, "half": 10, "more": 25}
    order = data.order()
    rows = [
        Counter(e for step in range(n * 55, n * 55 + 55) for e in order.batch(step) if data.entries.sources[e] == 2)
        for n in range(6)
    ]
    # 25 uses of three images: each eight times, and one of them, another in each epoch, once more.
    assert all(sorted(counts.values()) == [8, 8, 9] for counts in rows)
    assert len({counts.most_common(1)[0][0] for counts in rows}) > 1


def test_sources_without_held_out_images_are_not_validated(tmp_path: Path) -> None:
    a, b = (folder(tmp_path, name, [(64, 64)] * 4) for name in "ab")
    data = mixed({"a": source(a), "b": source(b, hold_out=2)})
    validated = list(data.val_dataloader())
    assert {prompt for batch in validated for prompt in batch["prompts"]} == {"a b"}
    assert sum(len(batch["prompts"]) for batch in validated) == 2 * VALIDATION_TIMESTEPS
    assert mixed({"a": source(a), "b": source(b)}).val_dataloader() == []


def test_entries_that_are_drawn_depend_on_seed_epoch_and_source(tmp_path: Path) -> None:
    sources = {
        "a": source(folder(tmp_path, "a", [(64, 64)] * 16)),
        "b": source(folder(tmp_path, "b", [(64, 64)] * 10), weight=0.2),
    }

    def drawn(seed: int, epoch: int) -> list[int]:
        data = mixed(sources, batch_size=1, seed=seed)
        order = data.order()
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        return sorted(e for step in steps for e in order.batch(step) if data.entries.sources[e] == 1)

    assert drawn(0, 3) == drawn(0, 3)
    assert len({tuple(drawn(0, epoch)) for epoch in range(5)}) > 1
    assert len({tuple(drawn(seed, 0)) for seed in range(5)}) > 1
    assert all(len(drawn(0, epoch)) == 3 for epoch in range(4))


def test_each_image_is_used_at_each_resolution_that_it_fills(tmp_path: Path) -> None:
    path = folder(tmp_path, "dog", [(32, 32), (70, 70), (200, 150), (40, 90)])
    data = mixed({"dog": source(path, resolution=[96, 32, 64])}, batch_size=1)
    found = Counter(
        (int(row), *map(int, size)) for row, size in zip(data.entries.rows, data.entries.sizes, strict=True)
    )
    by_image: dict[int, list[tuple[int, int]]] = {}
    for row, width, height in found:
        by_image.setdefault(row, []).append((width, height))
    assert by_image[0] == [(32, 32)], "smaller than 64 pixels"
    assert sorted(by_image[1]) == [(32, 32), (64, 64)], "smaller than 96 pixels"
    assert len(by_image[2]) == 3
    assert data.side == 96
    alone = opened(Path(path), resolution=32, batch_size=1)
    assert [tuple(size) for size in data.entries.sizes[:4].tolist()] == [alone.bucket(s) for s in alone.train]
    assert {tuple(batch["pixels"].shape[2:]) for batch in batches(data)} >= {(32, 32), (64, 64)}


# --- batches


def test_batches_have_class_images_for_all_samples_or_for_none(tmp_path: Path) -> None:
    class_path = folder(tmp_path, "class", [(64, 64)] * 3)
    sources = {
        "subject": source(folder(tmp_path, "a", [(64, 64)] * 4), class_path=class_path, class_prompt="a cat"),
        "style": source(folder(tmp_path, "b", [(64, 64)] * 4)),
    }
    data = mixed(sources, steps=8)
    found = batches(data)
    for batch in found:
        names = {prompt for prompt in batch["prompts"] if prompt != "a cat"}
        assert len(names) == 1
        assert ("subject_count" in batch) == (names == {"a a"})
        assert batch["prompts"].count("a cat") == (2 if names == {"a a"} else 0)
        assert "weights" not in batch
        assert batch["sources"].shape == (len(batch["prompts"]), 2)
        assert batch["sources"].sum(0).tolist() == ([2.0, 0.0] if names == {"a a"} else [0.0, 2.0])
    assert {batch["prompts"][0] for batch in found} == {"a a", "a b"}


def test_loss_weights_are_those_of_the_sources(tmp_path: Path) -> None:
    class_path = folder(tmp_path, "class", [(64, 64)] * 2)
    sources = {
        "a": source(folder(tmp_path, "a", [(64, 64)] * 3), class_path=class_path, class_prompt="c", prior_weight=0.25),
        "b": source(folder(tmp_path, "b", [(64, 64)] * 3), loss_weight=0.5),
    }
    weights = {"a a": 1.0, "c": 0.25, "a b": 0.5}
    for batch in batches(mixed(sources)):
        assert batch["weights"].tolist() == [weights[prompt] for prompt in batch["prompts"]]


def test_images_without_mask_count_whole(tmp_path: Path) -> None:
    masked = folder(tmp_path, "masked", [(64, 64)] * 2)
    for number in range(2):
        Image.new("L", (64, 64), 0).save(tmp_path / "masked" / f"{number:02d}.mask.png")
    sources = {"masked": source(masked, mask="file"), "plain": source(folder(tmp_path, "plain", [(64, 64)] * 2))}
    values = {
        (prompt, float(mask.mean()))
        for batch in batches(mixed(sources))
        for prompt, mask in zip(batch["prompts"], batch["mask"], strict=True)
    }
    assert values == {("a masked", 0.0), ("a plain", 1.0)}


def test_sources_have_their_own_captions_templates_and_dropout(tmp_path: Path) -> None:
    sources = {
        "a": source(
            folder(tmp_path, "a", [(64, 64)] * 2), prompt="x, y, z", captions=Captions(kind="tags", shuffle=True)
        ),
        "b": source(folder(tmp_path, "b", [(64, 64)] * 2), templates=["photo of {}"], trigger="sks"),
        "c": source(folder(tmp_path, "c", [(64, 64)] * 2), trigger="zzz", caption_dropout=1.0),
    }
    data = mixed(sources, steps=30)
    prompts = {prompt for batch in batches(data) for prompt in batch["prompts"]}
    tags = {p for p in prompts if sorted(p.split(", ")) == ["x", "y", "z"]}
    assert len(tags) > 2
    assert prompts - tags == {"photo of sks, a b", "zzz"}
    assert data.trigger_words() == "x y z, sks, zzz"


def test_caches_hold_all_sources(tmp_path: Path) -> None:
    sources = {
        "a": source(folder(tmp_path, "a", [(64, 64)] * 2), flip=True, resolution=[32, 64]),
        "b": source(folder(tmp_path, "b", [(64, 64)] * 2), captions=Captions(wildcards=True, suffix="{x|y}")),
    }
    data = mixed(sources, steps=20, cache_latents=True, cache_text=True)
    data.prepare(encoders(tmp_path / "cache"))
    found = batches(data)
    assert all("moments" in batch and "conditioning" in batch for batch in found)
    assert {prompt for batch in found for prompt in batch["prompts"]} == {"a a", "a b x", "a b y"}


def test_fingerprint_depends_on_every_source(tmp_path: Path) -> None:
    paths = [folder(tmp_path, name, [(64, 64)] * 2) for name in "ab"]

    def fingerprint(**settings: Any) -> str:
        return mixed({"a": source(paths[0]), "b": source(paths[1], **settings)}).fingerprint

    whole = fingerprint()
    assert fingerprint() == whole
    assert fingerprint(weight=2.0) != whole
    noise(tmp_path / "b" / "00.png", 64, 64, seed=99)
    assert fingerprint() != whole


def test_loss_weights_of_a_single_source_have_an_effect(tmp_path: Path) -> None:
    class_path = folder(tmp_path, "class", [(64, 64)] * 2)
    one = source(folder(tmp_path, "a", [(64, 64)] * 3), class_path=class_path, class_prompt="c", prior_weight=0.25)
    assert {batch["prior_weight"] for batch in batches(mixed({"a": one}))} == {0.25}
    weighted = source(folder(tmp_path, "b", [(64, 64)] * 3), loss_weight=0.5)
    assert {float(w) for batch in batches(mixed({"b": weighted})) for w in batch["weights"]} == {0.5}


def test_previews_and_prompts_take_the_sources_in_turn(tmp_path: Path) -> None:
    sources = {}
    for name in "ab":
        path = folder(tmp_path, name, [(64, 64)] * 3)
        for number in range(3):
            (tmp_path / name / f"{number:02d}.txt").write_text(f"{name}{number}", encoding="utf-8")
        sources[name] = source(path, prompt=None)
    assert list(mixed(sources).training_prompts()) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_shown_size_is_the_largest_that_is_trained(tmp_path: Path) -> None:
    data = mixed({"a": source(folder(tmp_path, "a", [(70, 70), (96, 96)]), resolution=[64, 96])})
    assert [data.parts["a"].bucket(sample) for sample in data.train] == [(64, 64), (96, 96)]


# --- refusals


def test_sources_with_and_without_maps_are_refused(tmp_path: Path) -> None:
    a, b = (folder(tmp_path, name, [(64, 64)] * 2) for name in "ab")
    with pytest.raises(UserError, match=r"^data\.sources\.b\.control: sources with and without control maps cannot"):
        Mix(sources={"a": source(a, control=Canny()), "b": source(b)})
    for other in (Paired(a), Canny(low=50)):
        with pytest.raises(UserError, match=r"sources with different control maps cannot be mixed; set the same"):
            Mix(sources={"a": source(a, control=Canny()), "b": source(b, control=other)})
    Mix(sources={"a": source(a, control=Paired(a)), "b": source(b, control=Paired(b))})
    assert isinstance(Mix(sources={"a": source(a, control=Canny()), "b": source(b, control=Canny())}).control, Canny)


def test_invalid_sources_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, "a", [(64, 64)])
    for sources, message in (
        ({}, "data.sources: there are no sources; set data.sources.NAME.path=DIR"),
        ({"a b": source(path)}, "data.sources.a b: 'a b' is not a name; use letters, digits, _ and -"),
        ({"a": source(path, weight=2.0, repeats=3)}, "data.sources.a.weight: cannot be combined with repeats"),
        ({"a": Mix(sources={"b": source(path)})}, "data.sources.a: is a mix itself; list its sources here"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            Mix(sources=sources)  # type: ignore[arg-type]


def test_errors_name_the_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    data = Mix(sources={"dog": source(str(tmp_path / "empty"))})
    with pytest.raises(UserError, match=r"^data\.sources\.dog\.path: no images found in"):
        data.open(64, 4)
    path = folder(tmp_path, "a", [(64, 64)])
    data = Mix(sources={"dog": source(path, prompt=None)})
    with pytest.raises(UserError, match=r"^data\.sources\.dog\.path: 1 of 1 .*; set data\.sources\.dog\.prompt="):
        data.open(64, 4)


# --- config


def node(**sources: Any) -> dict[str, Any]:
    captions = {"_target_": "sdtune.data.captions.Captions", "kind": "text"}
    return {"_target_": "sdtune.data.Mix", "batch_size": 4, "flip": True, "captions": captions, "sources": sources}


def test_sources_inherit_the_settings_of_the_mix(tmp_path: Path) -> None:
    a, b = (folder(tmp_path, name, [(64, 64)]) for name in "ab")
    config = node(
        a={"path": a, "prompt": "x"},
        b={"kind": "folder", "path": b, "prompt": "y", "flip": False, "captions": {"prefix": "p"}, "weight": 2},
        c={"kind": "pocket_subject", "subject": "koala"},
    )
    check_data(config, ())
    data = build_data(config, (), seed=3)
    assert isinstance(data, Mix)
    assert [type(part).__name__ for part in data.parts.values()] == ["Folder", "Folder", "Subject"]
    assert [part.flip for part in data.parts.values()] == [True, False, True]
    assert data.parts["b"].captions == Captions(prefix="p")
    assert (data.batch_size, data.seed, data.parts["b"].weight) == (4, 3, 2)
    assert config["sources"]["a"] == {"path": a, "prompt": "x"}, "unchanged"


def test_random_crop_is_possible_in_a_mix(tmp_path: Path) -> None:
    path = folder(tmp_path, "a", [(96, 96)])
    config = {**node(a={"path": path, "prompt": "x"}), "random_crop": True, "cache_latents": False}
    assert build_data(config, (), 0).parts["a"].random_crop
    with pytest.raises(
        UserError, match=r"^data\.sources\.a\.random_crop: not possible .*; set data\.cache_latents=false"
    ):
        build_data({**config, "cache_latents": True}, (), 0)


def test_settings_of_sources_are_refused_outside_of_a_mix(tmp_path: Path) -> None:
    config = {"_target_": "sdtune.data.Folder", "path": str(tmp_path), "loss_weight": 0.5}
    with pytest.raises(UserError, match=r"^data\.loss_weight: is a setting of a source of data=mix; remove"):
        check_data(config, ())


def test_options_of_control_maps_are_read_from_the_config_group(tmp_path: Path) -> None:
    path = folder(tmp_path, "a", [(64, 64)])
    config = node(a={"path": path, "prompt": "x", "control": {"option": "canny", "low": 50}})
    data = build_data(config, (), seed=0)
    assert isinstance(data.control, Canny)
    assert data.control.low == 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "foldr", "path": "x"},
            r"data\.sources\.a\.kind: unknown kind foldr; did you mean folder.*; use one of folder, ",
        ),
        ({"path": "x", "batch_size": 2}, r"data\.sources\.a\.batch_size: belongs to the mix, .*; set data\.batch_size"),
        ({"path": "x", "pth": 2}, r"data\.sources\.a\.pth: not a setting of Folder"),
        ({"prompt": "x"}, r"data\.sources\.a\.path: missing value; set data\.sources\.a\.path=VALUE"),
        ({"path": "x", "captions": {"kind": "tag"}}, r"data\.sources\.a\.captions\.kind: got \"tag\""),
        ({"path": "x", "captions": {"shuffle": True}}, r"data\.sources\.a\.captions\.shuffle: has no effect on"),
        ("x", r"data\.sources\.a: got 'x'; set the settings of a source, such as data\.sources\.a\.path=DIR"),
    ],
)
def test_invalid_settings_of_sources_are_refused(settings: Any, message: str) -> None:

    def checked() -> None:
        check_data(node(a=settings), ())
        build_data(node(a=settings), (), 0)

    with pytest.raises(UserError, match=f"^{message}"):
        checked()


def test_config_without_sources_is_unchanged() -> None:
    config = {"_target_": "sdtune.data.Folder", "path": "x"}
    assert with_targets(config) == config


def test_source_sums_are_those_of_the_samples(tmp_path: Path) -> None:
    sources = {name: source(folder(tmp_path, name, [(64, 64)] * 3)) for name in "ab"}
    batch = batches(mixed(sources, batch_size=4))[0]
    per_sample = torch.arange(4.0)
    names = np.array([prompt[-1] for prompt in batch["prompts"]])
    sums = per_sample @ batch["sources"]
    assert sums.tolist() == [float(per_sample.numpy()[names == name].sum()) for name in "ab"]
