"""What a run says of its data before it trains."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from running import fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.callbacks.data_summary import DataSummary
from sdtune.methods import LoRA


def test_images_order_and_the_longest_caption_are_named(
    tiny: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sdtune")
    (images / "0.txt").write_text("a " * 100)
    source = Pretrained(str(tiny))
    data = folder_data(images, hold_out=5)
    data.open(source.facts.side, source.facts.factor)  # as a command does, whose checks read the data
    fit(LoRA(rank=1, backbone=source), data, 3, [DataSummary(3)])
    said = [record.getMessage() for record in caplog.records]
    first = next(i for i, line in enumerate(said) if line.startswith("data: "))
    assert said[first].startswith(
        f"data: {len(data.train)} images, {len(data.train)} with repeats, 1 held out; buckets"
    )
    assert "step(s) an epoch at batch size 2; 3 steps are" in said[first + 1]
    assert said[first + 2].endswith("the longest has 102 tokens of 77")
    assert said[first + 3].startswith("WARNING: captions above 77 tokens are cut; the longest is 'a a a")
