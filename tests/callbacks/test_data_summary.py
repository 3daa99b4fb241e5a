"""Summary of the data in the log before training."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from running import fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.callbacks.data_summary import DataSummary, size_warnings, summary
from sdtune.methods import LoRA


@pytest.mark.parametrize(
    ("resolution", "warnings"),
    [(None, 0), (48, 1), (64, 1), (68, 2)],
    ids=["own", "images are smaller", "twice the size", "far from the backbone's size"],
)
def test_sizes_that_a_recipe_for_another_model_causes_are_warned_about(
    tiny: Path, images: Path, resolution: int | None, warnings: int
) -> None:
    facts, data = Pretrained(str(tiny)).facts, folder_data(images, resolution=resolution)
    data.open(facts.side, facts.factor)
    lines = [line for line in size_warnings(data, facts.side) if "step of the buckets" not in line]
    assert len(lines) == warnings
    if warnings:
        assert f"images are smaller than data.resolution={resolution}" in lines[-1]
    if warnings == 2:
        assert "data.resolution is 68, but the backbone was trained at 32 pixels" in lines[0]


def test_resolution_between_two_steps_of_the_buckets_is_named(tiny: Path, images: Path) -> None:
    facts, data = Pretrained(str(tiny)).facts, folder_data(images, resolution=36)
    data.open(facts.side, facts.factor)
    assert "data.resolution=36 is not a multiple of 32" in size_warnings(data, facts.side)[0]
    assert "square images are trained at 32x32" in size_warnings(data, facts.side)[0]
    assert {data.bucket(sample) for sample in data.train} == {(32, 32)}


def test_summary_names_images_order_and_longest_caption(
    tiny: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sdtune")
    (images / "0.txt").write_text("a " * 100, encoding="utf-8")
    source = Pretrained(str(tiny))
    data = folder_data(images, hold_out=5)
    data.open(source.facts.side, source.facts.factor)  # as the checks of a command do
    fit(LoRA(rank=1, backbone=source), data, 3, [DataSummary(3)])
    messages = [record.getMessage() for record in caplog.records]
    first = next(i for i, line in enumerate(messages) if line.startswith("data: "))
    assert messages[first].startswith(
        f"data: {len(data.train)} images, {len(data.train)} with repeats, 1 held out; buckets"
    )
    assert "step(s) per epoch at batch size 2; 3 steps are" in messages[first + 1]
    assert messages[first + 2].endswith("the longest has 102 tokens, the limit is 77")
    assert messages[first + 3].startswith(
        "WARNING: captions longer than 77 tokens are truncated: 1 of 5; the longest is 'a a a"
    )


def test_summary_names_the_class_images(images: Path, tmp_path: Path) -> None:
    generated = folder_data(images, class_prompt="a photo of a dog", class_images=6, prior_weight=1.0)
    generated.open(32, 4)
    assert "class images: 6 generated, of 'a photo of a dog'" in summary(generated, 1)
    shutil.copytree(images, tmp_path / "class")
    given = folder_data(images, class_path=str(tmp_path / "class"), class_prompt="dog", trigger="sks", prior_weight=1.0)
    given.open(32, 4)
    assert f"class images: {len(given.class_samples)} in {tmp_path}/class" in summary(given, 1)
