"""Which files are written next to images: never existing ones, and one for each image."""

from __future__ import annotations

from pathlib import Path

import pytest

from caption_models import save_photos
from sdtune.captioning.outputs import caption_outputs, mask_outputs
from sdtune.errors import UserError


def names(targets: dict[Path, Path]) -> dict[str, str]:
    return {image.name: target.name for image, target in targets.items()}


def test_images_with_any_caption_file_are_skipped(tmp_path: Path) -> None:
    save_photos(tmp_path, 4)
    (tmp_path / "00.txt").write_text("a", encoding="utf-8")
    (tmp_path / "01.caption").write_text("b", encoding="utf-8")
    (tmp_path / "02.TXT").write_text("c", encoding="utf-8")
    outputs = caption_outputs(str(tmp_path), overwrite=False)
    assert names(outputs.missing) == {"03.png": "03.txt"}
    assert outputs.existing == 3


def test_overwriting_replaces_the_existing_file_under_its_name(tmp_path: Path) -> None:
    """A new 01.txt next to 01.caption would be a second caption."""
    save_photos(tmp_path, 2)
    (tmp_path / "01.caption").write_text("b", encoding="utf-8")
    outputs = caption_outputs(str(tmp_path), overwrite=True)
    assert names(outputs.missing) == {"00.png": "00.txt", "01.png": "01.caption"}
    assert outputs.existing == 0


def test_masks_are_not_images_and_are_not_overwritten(tmp_path: Path) -> None:
    save_photos(tmp_path / "sub", 2)
    save_photos(tmp_path, 1)
    (tmp_path / "00.png").rename(tmp_path / "sub" / "00.mask.png")
    outputs = mask_outputs(str(tmp_path), overwrite=False)
    assert names(outputs.missing) == {"01.png": "01.mask.png"}
    assert outputs.existing == 1
    assert names(mask_outputs(str(tmp_path), overwrite=True).missing) == {
        "00.png": "00.mask.png",
        "01.png": "01.mask.png",
    }


@pytest.mark.parametrize("listed", [caption_outputs, mask_outputs])
def test_images_that_would_share_a_file_are_refused(listed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_photos(tmp_path, 1)
    (tmp_path / "00.jpg").write_bytes((tmp_path / "00.png").read_bytes())
    with pytest.raises(UserError, match=r"^data\.path: .*00\.jpg and 00\.png would have the same \w+ file, 00\."):
        listed(str(tmp_path), overwrite=False)
    (tmp_path / "00.txt").write_text("a", encoding="utf-8")
    (tmp_path / "00.mask.png").touch()
    assert listed(str(tmp_path), overwrite=False).missing == {}


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_photos(tmp_path / "sub", 1)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "sub")
    with pytest.raises(UserError, match=r"^data\.path: .*/sub is not writable; make it writable, or copy the images$"):
        mask_outputs(str(tmp_path), overwrite=False)
    (tmp_path / "sub" / "00.mask.png").touch()
    assert mask_outputs(str(tmp_path), overwrite=False).existing == 1


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.path: no images found in .*: it is empty; set a folder with"):
        caption_outputs(str(tmp_path), overwrite=False)
