"""``sdtune prepare``: what it leaves is what the training would have made, and can be looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drawings import save_drawings
from running import arguments, prepare, train
from sdtune.data.control.edges import Canny


def test_class_images_are_there_before_the_training(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    own = ["data.class_prompt=a dog", "data.class_images=3", "trainer.max_steps=1"]
    assert prepare(*arguments(tiny, images, tmp_path / "seen", *own)) == 0
    drawn = sorted((tmp_path / "cache" / "class").rglob("*.png"))
    assert len(drawn) == 3
    assert {p.name for p in (tmp_path / "seen").glob("*.png")} == {"images.png", "class.png"}
    assert not (tmp_path / "seen" / "metrics.csv").exists()
    files = {p for p in (tmp_path / "cache").rglob("*") if p.is_file()}

    monkeypatch.setattr("sdtune.training.caching.generate", lambda *_: pytest.fail("drawn again"))
    assert train(*arguments(tiny, images, tmp_path / "run", *own)) == 0
    assert {p for p in (tmp_path / "cache").rglob("*") if p.is_file()} == files, "the training made something itself"


def test_every_map_is_written_to_be_looked_at(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtune.commands.prepare._SHOWN", 2)  # of the grids
    folder = save_drawings(tmp_path / "drawings")
    own = [a for a in arguments(tiny, folder, tmp_path / "seen") if not a.startswith("method")]
    assert prepare(*own, "method=controlnet", "data/control=canny") == 0
    maps = sorted((tmp_path / "seen" / "maps").glob("*.png"))
    assert len(maps) == 5
    shown = np.asarray(Image.open(maps[0]).convert("RGB"))
    image = np.asarray(Image.open(folder / "0.png"))
    assert shown.shape == (32, 32, 3)
    assert 0 < (shown > 0).mean() < 0.5
    assert Canny().extract(image).any()
    assert {"images.png", "maps.png"} <= {p.name for p in (tmp_path / "seen").glob("*.png")}


def test_what_training_refuses_is_refused(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [a for a in arguments(tiny, images, tmp_path / "seen") if not a.startswith("method")]
    assert prepare(*own, "method=dreambooth") == 2
    assert "data.class_prompt is missing" in capsys.readouterr().err
    assert not (tmp_path / "seen").exists()
