"""``sdtune prepare`` writes the caches of the training, and images of the training inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drawings import save_drawings
from running import arguments, prepare, train
from sdtune.data.control.edges import Canny


def test_training_reuses_prepared_class_images_and_caches(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    settings = ["data.class_prompt=a dog", "data.class_images=3", "trainer.max_steps=1"]
    assert prepare(*arguments(tiny, images, tmp_path / "seen", *settings)) == 0
    class_images = sorted((tmp_path / "cache" / "class").rglob("*.png"))
    assert len(class_images) == 3
    assert {p.name for p in (tmp_path / "seen").glob("*.png")} == {"images.png", "class.png"}
    assert not (tmp_path / "seen" / "metrics.csv").exists()
    files = {p for p in (tmp_path / "cache").rglob("*") if p.is_file()}

    monkeypatch.setattr("sdtune.training.caching.generate", lambda *_: pytest.fail("class images are generated again"))
    assert train(*arguments(tiny, images, tmp_path / "run", *settings)) == 0
    assert {p for p in (tmp_path / "cache").rglob("*") if p.is_file()} == files, "the training wrote to the cache"


def test_all_control_maps_are_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtune.commands.prepare._MAX_SHOWN", 2)  # limits only the grids
    folder = save_drawings(tmp_path / "drawings")
    common = [a for a in arguments(tiny, folder, tmp_path / "seen") if not a.startswith("method")]
    assert prepare(*common, "method=controlnet", "data/control=canny") == 0
    maps = sorted((tmp_path / "seen" / "maps").glob("*.png"))
    assert len(maps) == 5
    control_map = np.asarray(Image.open(maps[0]).convert("RGB"))
    image = np.asarray(Image.open(folder / "0.png"))
    assert control_map.shape == (32, 32, 3)
    assert 0 < (control_map > 0).mean() < 0.5
    assert Canny().extract(image).any()
    assert {"images.png", "maps.png"} <= {p.name for p in (tmp_path / "seen").glob("*.png")}


def test_invalid_training_config_is_refused(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [a for a in arguments(tiny, images, tmp_path / "seen") if not a.startswith("method")]
    assert prepare(*common, "method=dreambooth") == 2
    assert "data.class_prompt: missing" in capsys.readouterr().err
    assert not (tmp_path / "seen").exists()
