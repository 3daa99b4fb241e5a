"""``sdtune mask`` from the command line: files, sizes, resuming, and refused settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from caption_models import build_clipseg, save_photos
from running import folder_data, sdtune


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clipseg(tmp_path_factory.mktemp("models") / "clipseg")


def mask(folder: Path, model: Path, *more: str) -> int:
    return sdtune("mask", str(folder), f"model={model}", "hardware=cpu", *more)


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_masks_are_read_by_the_data_source(clipseg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_photos(tmp_path / "photos", 3, 64, 48)
    assert mask(folder, clipseg, "words=cat,dog", "threshold=0.5") == 0
    assert capsys.readouterr().out == f"3 masks written in {folder}\n"
    assert {value for i in range(3) for value in np.unique(opened(folder / f"{i:02d}.mask.png"))} == {0, 255}
    data = folder_data(folder, prompt="a cat", mask="file")
    data.open(32, 4)
    assert len(data.train) == 3


def test_mask_of_a_rotated_image_has_its_upright_size(clipseg: Path, tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos", 1, 48, 32)
    with Image.open(folder / "00.png") as image:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        image.save(folder / "00.jpg", exif=exif)
    (folder / "00.png").unlink()
    assert mask(folder, clipseg, "words=cat") == 0
    assert opened(folder / "00.mask.png").shape == (48, 32)


def test_existing_masks_are_replaced_only_if_asked_for(
    clipseg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_photos(tmp_path / "photos", 3)
    Image.new("L", (32, 24), 7).save(folder / "01.mask.png")
    assert mask(folder, clipseg, "words=cat", "threshold=null", "batch_size=1") == 0
    assert (opened(folder / "01.mask.png") == 7).all()
    assert "2 masks written" in capsys.readouterr().out
    gray = opened(folder / "00.mask.png")
    assert len(np.unique(gray)) > 2
    (folder / "00.mask.png").unlink()
    assert mask(folder, clipseg, "words=cat", "threshold=null", "overwrite=true") == 0
    assert np.array_equal(opened(folder / "00.mask.png"), gray)
    assert not (opened(folder / "01.mask.png") == 7).all()


def test_black_masks_and_damaged_images_are_reported(
    clipseg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_photos(tmp_path / "photos", 3)
    (folder / "02.png").write_bytes(b"nothing")
    assert mask(folder, clipseg, "words=cat", "threshold=1") == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == (
        "black everywhere: 2 (00.mask.png, 01.mask.png); try other words or a lower threshold"
    )
    assert err.splitlines()[0].startswith(f"{folder}/02.png is not a readable image (")
    assert "images without a mask, because they cannot be read: 1 of 3" in err
    assert (opened(folder / "00.mask.png") == 0).all()
    assert not (folder / "02.mask.png").exists()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ([], "words: missing value; set words=VALUE"),
        (
            ["words=a cat, a dog"],
            "words: several values (a cat, a dog); quote the value if it is one text: 'words=\"a cat",
        ),
        (["words=[]"], "words: got []; "),
        (["words="], 'words.0: got ""; '),
        (["words=cat", "threshold=1.5"], "threshold: got 1.5; expected float > 0, <= 1 or null"),
        (["words=cat", "batch_size=many"], 'batch_size: got "many"; expected int >= 1'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_setting_is_refused_in_one_line(
    settings: list[str], line: str, clipseg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_photos(tmp_path / "photos", 1)
    assert mask(folder, clipseg, *settings) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith(f"sdtune: {line}")
    assert not (folder / "00.mask.png").exists()
