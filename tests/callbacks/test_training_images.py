"""``training_images/`` of a run: small copies of the training images with their captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from running import arguments, train


def test_first_images_are_copied_with_their_captions(tiny: Path, images: Path, tmp_path: Path) -> None:
    for number in range(14):
        Image.fromarray(np.full((32, 32, 3), 10 * number, np.uint8)).save(images / f"more{number:02d}.png")
        (images / f"more{number:02d}.txt").write_text(f"image number {number}", encoding="utf-8")
    assert train(*arguments(tiny, images, tmp_path / "run", "trainer.max_steps=1")) == 0
    folder = tmp_path / "run" / "training_images"
    content = json.loads((folder / "images.json").read_text(encoding="utf-8"))
    shown = content["shown"]
    assert len(shown) == 12 < content["images"]
    assert sorted(path.name for path in folder.iterdir()) == [*(entry["file"] for entry in shown), "images.json"]
    entry = next(entry for entry in shown if entry["caption"] == "image number 3")
    with Image.open(folder / entry["file"]) as image:
        assert max(image.size) <= 256
        assert abs(np.asarray(image.convert("RGB")).mean() - 30) < 3
