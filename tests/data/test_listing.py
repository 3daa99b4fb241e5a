"""Files that a data module reads below its folder, and what the data summary says about the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from running import folder_data
from sdtune.callbacks.data_summary import summary
from sdtune.data import Folder
from sdtune.data.control.paired import Paired
from sdtune.errors import UserError


def save(path: Path, caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def opened(folder: Path, **settings: object) -> Folder:
    data = folder_data(folder, batch_size=1, **settings)
    data.open(64, 8)
    return data


def names(data: Folder, root: Path) -> list[str]:
    return [Path(str(sample)).relative_to(root).as_posix() for sample in data.train]


def test_folders_that_sdtune_has_written_are_left_out(tmp_path: Path) -> None:
    save(tmp_path / "a.png", "a cat")
    for run in ("outputs/lora/1", "outputs/lora/2"):
        save(tmp_path / run / "samples" / "grid.png")
        (tmp_path / run / ".hydra").mkdir()
    save(tmp_path / "outputs" / "sweeps" / "1" / "0" / "grid.png")
    (tmp_path / "outputs" / "sweeps" / "1" / "multirun.yaml").touch()
    data = opened(tmp_path)
    assert names(data, tmp_path) == ["a.png"]
    line = "not read: 3 (outputs/lora/1, outputs/lora/2, outputs/sweeps/1): written by sdtune"
    assert line in summary(data, 1)


def test_folder_of_a_run_is_read_if_it_is_named(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    save(tmp_path / "samples" / "a.png", "a cat")
    assert names(opened(tmp_path), tmp_path) == ["samples/a.png"]


@pytest.mark.parametrize("name", ["@eaDir", "$RECYCLE.BIN", "__MACOSX"])
def test_folders_of_the_operating_system_are_left_out(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.png", "a cat")
    save(tmp_path / name / "thumbnail.png")
    data = opened(tmp_path)
    assert names(data, tmp_path) == ["a.png"]
    assert f"not read: 1 ({name}): made by the operating system" in data.notices


def test_folders_with_another_role_are_left_out(tmp_path: Path) -> None:
    save(tmp_path / "a.png", "a sks cat")
    for role in ("class", "validation"):
        save(tmp_path / role / "b.png", "a cat")
    (tmp_path / "linked").symlink_to(tmp_path / "validation")
    data = opened(tmp_path, class_path=str(tmp_path / "class"), validation_path=str(tmp_path / "linked"))
    assert names(data, tmp_path) == ["a.png"]
    assert "not read: 1 (class): used as data.class_path" in data.notices
    assert len(data.held_out) == len(data.class_samples) == 1


def test_control_maps_below_the_images_are_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "maps/a.png"):
        save(tmp_path / name)
    data = opened(tmp_path, prompt="a cat", control=Paired(str(tmp_path / "maps")))
    assert names(data, tmp_path) == ["a.png"]
    assert "not read: 1 (maps): used as data.control.path" in data.notices


def test_images_below_the_class_images_are_left_out(tmp_path: Path) -> None:
    save(tmp_path / "a.png", "a cat")
    save(tmp_path / "subject" / "b.png", "a sks cat")
    data = opened(tmp_path / "subject", class_path=str(tmp_path))
    assert [sample.caption for sample in data.class_samples] == ["a cat"]


@pytest.mark.parametrize("role", ["class_path", "validation_path"])
def test_folder_with_two_roles_is_refused(tmp_path: Path, role: str) -> None:
    save(tmp_path / "a.png", "a cat")
    (tmp_path / "link").symlink_to(tmp_path)
    message = rf"^data\.path: .* is also set as data\.{role}; use a separate folder for each"
    with pytest.raises(UserError, match=message):
        opened(tmp_path, **{role: str(tmp_path / "link")})


def test_class_image_with_a_caption_of_the_subject_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "subject" / "a.png", "a sks cat")
    save(tmp_path / "class" / "b.png", "a sks cat")
    with pytest.raises(UserError, match=r"^data\.class_path: 'a sks cat', the caption of .*b\.png, is also a caption"):
        opened(tmp_path / "subject", class_path=str(tmp_path / "class"))


def test_only_folders_of_runs_is_an_error_that_says_so(tmp_path: Path) -> None:
    save(tmp_path / "1" / "samples" / "grid.png")
    (tmp_path / "1" / ".hydra").mkdir()
    with pytest.raises(UserError, match=r"no images found in .*: not read: 1 \(1\): written by sdtune"):
        opened(tmp_path)


def test_files_that_are_not_used_are_counted_and_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", "a cat")
    for name in ("b.jxl", "c.npz", "d.NPZ", "e.npz", "f.npz", "a.png.txt", "B.caption", "notes", "metadata.csv"):
        (tmp_path / name).touch()
    (tmp_path / "metadata.csv").write_text("file_name,text\n", encoding="utf-8")
    assert opened(tmp_path).notices == [
        "WARNING: captions without an image of the same name: 2 (B.caption, a.png.txt)",
        "WARNING: not read: .jxl: 1 (b.jxl); convert them to .png or .webp",
        "not read: .npz: 4 (c.npz, d.NPZ, e.npz, ...)",
        "not read: files without a suffix: 1 (notes)",
    ]


def test_prompt_that_no_image_needs_is_warned_about(tmp_path: Path) -> None:
    save(tmp_path / "a.png", "a cat")
    assert opened(tmp_path, prompt="a dog").notices == ["WARNING: data.prompt is not used: all images have captions"]
    assert opened(tmp_path, prompt="sks", trigger="sks").notices == []
    validation = tmp_path.with_name("validation")
    save(validation / "b.png")
    assert opened(tmp_path, prompt="a dog", validation_path=str(validation)).notices == []
    save(tmp_path / "b.png")
    assert opened(tmp_path, prompt="a dog").notices == []


def test_black_mask_and_transparent_image_are_warned_about(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    Image.new("L", (64, 64), 0).save(tmp_path / "a.mask.png")
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "b.png")
    Image.new("L", (64, 64), 1).save(tmp_path / "b.mask.png")
    assert opened(tmp_path, prompt="a cat", mask="file").notices == [
        f"WARNING: {tmp_path / 'b.png'} is transparent everywhere; it is trained as a white image",
        f"WARNING: {tmp_path / 'a.mask.png'} is black everywhere, so its image does not contribute to the loss",
    ]


def test_alpha_mask_is_the_transparency_of_the_image(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    data = opened(tmp_path, prompt="a cat", mask="alpha")
    masks = [sample.mask((64, 64), (0.5, 0.5), False) for sample in data.train]
    assert [float(mask.mean()) / 255 for mask in masks] == [0.5, 1.0]
    assert masks[0][:, :31].min() == 255
