"""Sources of captions and their precedence, images that are found in a folder, and errors for invalid folders."""

from __future__ import annotations

import json
import re
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from sdtune.data import Folder, indexing
from sdtune.data.table_samples import TableSample
from sdtune.errors import UserError
from sdtune.images.places import Place


def save_image(path: Path, width: int = 8, height: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def read(folder: Path | str, prompt: str | None = None, trigger: str | None = None) -> list[TableSample]:
    return list(Folder(path=str(folder), prompt=prompt, trigger=trigger).read()[0])  # type: ignore[arg-type]


def captions(folder: Path, prompt: str | None = None, trigger: str | None = None) -> dict[str, str]:
    return {s.place.file.relative_to(folder).as_posix(): s.caption for s in read(folder, prompt, trigger)}


def notices(folder: Path, prompt: str | None = None, trigger: str | None = None) -> list[str]:
    data = Folder(path=str(folder), prompt=prompt, trigger=trigger)
    data.read()
    return data.notices


def refused(folder: Path | str, *fragments: object, prompt: str | None = "p") -> None:
    """Assert that the folder is refused in one line that starts with the key and contains ``fragments`` in order."""
    pattern = r"\Adata\.path: .*" + ".*".join(re.escape(str(fragment)) for fragment in fragments)
    with pytest.raises(UserError, match=pattern) as caught:
        read(folder, prompt)
    assert "\n" not in str(caught.value)


def test_image_with_prompt_is_read(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.png", 30, 20)
    [sample] = read(tmp_path, "a dog")
    assert (sample.place, sample.caption, sample.size, sample.repeats) == (Place(path), "a dog", (30, 20), 1)


def test_images_are_sorted_by_path(tmp_path: Path) -> None:
    names = ["a-b/x.png", "a/x.png", "B.PNG", "a.jpg", "a/sub/y.webp", "b.JPeG"]
    for name in names:
        save_image(tmp_path / name)
    # Sorted by path components: "a" before "a-b", although "a-b/x.png" < "a/x.png" as strings.
    assert list(captions(tmp_path, "p")) == ["B.PNG", "a/sub/y.webp", "a/x.png", "a-b/x.png", "a.jpg", "b.JPeG"]


def test_hidden_files_and_macos_archive_folders_are_skipped(tmp_path: Path) -> None:
    root = tmp_path / ".cache"  # the root folder may be hidden
    for name in ("a.png", ".b.png", "._a.png", ".git/c.png", "__MACOSX/a.png", "sub/__MACOSX/a.png"):
        save_image(root / name)
    assert list(captions(root, "p")) == ["a.png"]


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = save_image(tmp_path / "dogs/a.png")
    assert read("~/dogs", "p")[0].place.file == path


def test_captions_are_read_from_sidecar_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.x.png", "d.png", "e.png"):
        save_image(tmp_path / name)
    (tmp_path / "a.txt").write_text("  a dog,\n  on\tgrass \r\n", encoding="utf-8")
    (tmp_path / "b.caption").write_text("ein Hündchen", encoding="utf-8")
    (tmp_path / "c.x.TXT").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "d.txt").write_text("", encoding="utf-8")
    (tmp_path / "README.txt").write_text("not a caption", encoding="utf-8")
    assert captions(tmp_path, "the prompt") == {
        "a.png": "a dog, on grass",
        "b.jpg": "ein Hündchen",
        "c.x.png": "with a mark",
        "d.png": "",
        "e.png": "the prompt",
    }


def test_empty_caption_is_accepted(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    assert captions(tmp_path) == {"a.png": ""}
    (tmp_path / "a.txt").unlink()
    assert captions(tmp_path, prompt="") == {"a.png": ""}


def test_image_with_two_sidecars_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.caption").touch()
    refused(tmp_path, tmp_path / "a.png", "two captions, a .txt and a .caption file; remove one, or set")


@pytest.mark.parametrize("column", ["text", "caption"])
def test_captions_are_read_from_metadata_jsonl(tmp_path: Path, column: str) -> None:
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "sub/b.png")
    rows = [{"file_name": "sub/b.png", column: "a\u2028cat", "rating": 3}, {"file_name": "a.png", column: ""}]
    text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert captions(tmp_path) == {"a.png": "", "sub/b.png": "a cat"}


@pytest.mark.parametrize("column", ["text", "caption"])
def test_captions_are_read_from_metadata_csv(tmp_path: Path, column: str) -> None:
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.png")
    text = f'\ufeffrating,file_name,{column}\r\n3,b.png,"a ""cat"",\r\nasleep"\r\n1,a.png,\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    assert captions(tmp_path) == {"a.png": "", "b.png": 'a "cat", asleep'}


def test_metadata_of_a_sub_folder_is_relative_to_the_sub_folder(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "sub/a.png")
    (tmp_path / "sub/metadata.csv").write_text("file_name,text\na.png,a cat\n", encoding="utf-8")
    assert captions(tmp_path, "p") == {"a.png": "p", "sub/a.png": "a cat"}


def test_repeats_and_captions_are_read_from_kohya_folder_names(tmp_path: Path) -> None:
    names = ["10_sks dog/a.png", "2_a_b/b.png", "3_/c.png", "plain/d.png", "plain/4_cat/e.png", "10_sks dog/more/f.png"]
    for name in names:
        save_image(tmp_path / name)
    images = {s.place.file.relative_to(tmp_path).as_posix(): (s.repeats, s.caption) for s in read(tmp_path, "p")}
    assert images == {
        "10_sks dog/a.png": (10, "sks dog"),
        "2_a_b/b.png": (2, "a_b"),
        "3_/c.png": (3, "p"),
        "plain/d.png": (1, "p"),
        "plain/4_cat/e.png": (4, "cat"),
        "10_sks dog/more/f.png": (1, "p"),
    }


def test_name_of_the_root_folder_is_ignored(tmp_path: Path) -> None:
    save_image(tmp_path / "10_sks dog/a.png")
    assert [(sample.repeats, sample.caption) for sample in read(tmp_path / "10_sks dog", "p")] == [(1, "p")]
    advice = f"to use the repeats and words in the name 10_sks dog, set data.path={tmp_path}"
    warning = f"WARNING: data.path: names count only below this folder; {advice}"
    assert notices(tmp_path / "10_sks dog", "p") == [warning]
    with pytest.raises(UserError, match=re.escape(advice)):
        read(tmp_path / "10_sks dog")


@pytest.mark.parametrize("name", ["0_sks dog", "-1_sks dog"])
def test_repeats_below_one_are_refused(tmp_path: Path, name: str) -> None:
    save_image(tmp_path / name / "a.png")
    refused(tmp_path, tmp_path / name, f"the folder name sets {name.split('_')[0]} repeats; use at least 1")


def test_sidecar_precedes_metadata_then_folder_name_then_prompt(tmp_path: Path) -> None:
    for name in "abcd":
        save_image(tmp_path / f"5_words/{name}.png")
    save_image(tmp_path / "e.png")
    (tmp_path / "5_words/a.txt").write_text("sidecar", encoding="utf-8")
    rows = [{"file_name": f"5_words/{name}.png", "text": "metadata"} for name in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert captions(tmp_path, "prompt") == {
        "5_words/a.png": "sidecar",
        "5_words/b.png": "metadata",
        "5_words/c.png": "words",
        "5_words/d.png": "words",
        "e.png": "prompt",
    }
    assert {sample.repeats for sample in read(tmp_path, "prompt")} == {1, 5}


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a dog", "sks", "sks, a dog"),
        ("sks dog", "sks", "sks dog"),
        ("sks", "sks", "sks"),
        ("sks, a dog", "sks", "sks, a dog"),
        ("sksy dog", "sks", "sks, sksy dog"),
        ("a sks dog", "sks", "sks, a sks dog"),
        ("", "sks", "sks"),
        ("a dog", "<my.dog>", "<my.dog>, a dog"),
        ("<my.dog> runs", "<my.dog>", "<my.dog> runs"),
        ("<my-dog> runs", "<my.dog>", "<my.dog>, <my-dog> runs"),
        ("a dog", "", "a dog"),
    ],
)
def test_trigger_is_put_before_captions_that_lack_it(tmp_path: Path, caption: str, trigger: str, expected: str) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(caption, encoding="utf-8")
    save_image(tmp_path / "b.png")
    assert captions(tmp_path, caption, trigger) == {"a.png": expected, "b.png": expected}


def test_image_without_caption_is_refused(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save_image(tmp_path / name)
    (tmp_path / "a.txt").write_text("a dog", encoding="utf-8")
    refused(tmp_path, "2 of 3 images have no caption", tmp_path / "b.png", 'data.prompt="a photo of ..."', prompt=None)


def test_folder_without_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "set a folder with .png, .jpg"
    refused(tmp_path, "no images found in", tmp_path, "it is empty", remedy)
    refused(tmp_path / "gone", "no images found in", tmp_path / "gone", "it does not exist", remedy)
    for name in ("a.mp4", "b.MP4", "c.txt", "sub/d.mp4", "LICENSE", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    refused(tmp_path, "no images found in", tmp_path, "it contains 3 .mp4, 1 without a suffix, 1 .txt;", remedy)
    refused(save_image(tmp_path / "a.png"), "no images found in", tmp_path / "a.png", "it is a file", remedy)
    monkeypatch.chdir(tmp_path)
    refused("sub", "no images found in", tmp_path / "sub")  # an absolute path, also for a relative setting


def test_two_metadata_files_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").touch()
    (tmp_path / "metadata.csv").touch()
    refused(tmp_path, tmp_path, "has both metadata.jsonl and metadata.csv; remove one")


@pytest.mark.parametrize("name", ["b.png", "../a.png", "notes.md", ""])
def test_metadata_of_unknown_image_is_refused(tmp_path: Path, name: str) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "notes.md").touch()
    (tmp_path / "metadata.jsonl").write_text("\n" + json.dumps({"file_name": name, "text": "x"}), encoding="utf-8")
    refused(tmp_path, tmp_path / "metadata.jsonl, line 2: unknown image", name, "correct or remove this row")
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.png,x\n{name},x\n", encoding="utf-8")
    refused(tmp_path, tmp_path / "metadata.csv, line 3: unknown image", name, "correct or remove this row")


def test_two_metadata_rows_for_one_image_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\na.png,y\n", encoding="utf-8")
    refused(tmp_path, tmp_path / "metadata.csv, line 3: duplicate row for a.png; remove one")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "x"},
        {"file_name": "a.png"},
        {"file_name": "a.png", "text": None},
        {"file_name": "a.png", "text": "x", "caption": "y"},
        {"file_name": 3, "text": "x"},
        ["a.png", "x"],
        "a.png",
    ],
)
def test_malformed_metadata_row_is_refused(tmp_path: Path, row: object) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    refused(tmp_path, tmp_path / "metadata.jsonl, line 1: a row needs a file_name and either a text or a caption")


@pytest.mark.parametrize("text", ["file_name,label\na.png,x\n", "a.png,x\na.png,y\n", "file_name,text\na.png\n"])
def test_csv_without_required_columns_is_refused(tmp_path: Path, text: str) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    refused(tmp_path, tmp_path / "metadata.csv, line 2: a row needs a file_name and either a text or a caption")


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_separators_of_a_csv_are_named(separator: str, name: str, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    text = f"file_name{separator}text\na.png{separator}a cat, asleep\n"
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    refused(tmp_path, f"metadata.csv: the columns are separated by {name}; save it with commas")


def test_backslashes_of_a_file_name_are_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_image(tmp_path / "sub" / "a.png")
    row = json.dumps({"file_name": "sub\\a.png", "text": "x"})
    (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8")
    refused(tmp_path, "metadata.jsonl, line 1: unknown image", "write file_name with slashes: sub/a.png")


def test_empty_captions_are_named_unless_a_trigger_replaces_them(tmp_path: Path) -> None:
    for name, caption in (("a", ""), ("b", "a cat"), ("c", " \n")):
        save_image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption, encoding="utf-8")
    assert "WARNING: the captions of these images are empty: 2 (a.png, c.png)" in notices(tmp_path)
    assert not any("empty" in line for line in notices(tmp_path, trigger="sks"))


def test_metadata_with_invalid_syntax_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": \n', encoding="utf-8")
    refused(tmp_path, tmp_path / "metadata.jsonl, line 2: not JSON (Expecting value)", "correct this row")
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"never closed\n', encoding="utf-8")
    refused(tmp_path, tmp_path / "metadata.csv, after line 1: unexpected end of data; correct this row")


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "metadata.jsonl", "metadata.csv"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, name: str) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / name).write_bytes("file_name,text\na.png,Hündchen".encode("latin-1"))
    refused(tmp_path, tmp_path / name, "is not UTF-8 text; save it as UTF-8")


def test_unreadable_caption_or_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    refused(tmp_path, tmp_path / "a.txt", "cannot be read (No such file or directory)")

    (tmp_path / "a.txt").unlink()

    def deny(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sdtune.data.listing.os.scandir", deny)
    refused(tmp_path, tmp_path, "cannot be read (Permission denied); make it readable")


def test_broken_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    refused(tmp_path, tmp_path / "a.png", "cannot be read (No such file or directory)")


def test_linked_folder_is_read_and_a_loop_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "store/a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/10_dog").symlink_to(tmp_path / "store")
    assert captions(tmp_path / "data") == {"10_dog/a.png": "dog"}
    (tmp_path / "store/loop").symlink_to(tmp_path / "data")
    refused(tmp_path / "data", "loop links to one of its parent folders; remove this link")


def test_text_file_with_png_suffix_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("text", encoding="utf-8")
    refused(tmp_path, tmp_path / "b.png", "is not a readable image", "remove or replace it")


def test_every_image_is_decoded_once_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(9):
        save_image(tmp_path / f"{index}.png")
    decoded, threads = [], set()

    def spy(place: Place) -> tuple[Image.Image, None]:
        decoded.append(place.file.name)
        threads.add(threading.current_thread())
        with Image.open(place.file) as image:
            return image.convert("RGB"), None

    monkeypatch.setattr(indexing, "open_with_alpha", spy)
    read(tmp_path, "p")
    assert sorted(decoded) == [f"{index}.png" for index in range(9)]
    assert threading.main_thread() not in threads
    read(tmp_path, "another prompt")
    assert len(decoded) == 9


def test_all_damaged_images_are_listed(tmp_path: Path) -> None:
    for name in "abcdef":
        path = save_image(tmp_path / f"{name}.jpg", 64, 64)
        if name in "ce":
            path.write_bytes(path.read_bytes()[:-500])
    for _ in range(2):  # the second time from the table
        reason = "is not a readable image"
        refused(tmp_path, "2 of 6 images are damaged:", tmp_path / "c.jpg", reason, tmp_path / "e.jpg", reason)


def test_damaged_images_are_left_out_with_skip(tmp_path: Path) -> None:
    for name in "abc":
        save_image(tmp_path / f"{name}.png")
    intact = Folder(path=str(tmp_path), prompt="p", damaged="skip")
    intact.open(8, 4)
    (tmp_path / "b.png").write_bytes(b"text")
    data = Folder(path=str(tmp_path), prompt="p", damaged="skip")
    data.open(8, 4)
    assert [s.place.file.name for s in data.train] == ["a.png", "c.png"]  # type: ignore[attr-defined]
    assert [image.place.file.name for image in data.skipped] == ["b.png"]
    assert any("1 of 3 images are damaged and left out" in line for line in data.notices)
    assert data.fingerprint != intact.fingerprint
    (tmp_path / "b.png").unlink()
    without = Folder(path=str(tmp_path), prompt="p", damaged="skip")
    without.open(8, 4)
    assert data.fingerprint != without.fingerprint, "the damaged image counts"


def test_folder_of_damaged_images_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"text")
    data = Folder(path=str(tmp_path), prompt="p", damaged="skip")
    with pytest.raises(UserError, match=r"^data\.path: all images are damaged; set a folder"):
        data.read()


def test_exif_orientation_after_the_pixel_data_is_applied(tmp_path: Path) -> None:
    path = save_image(tmp_path / "late.png", 8, 6)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    chunk = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = path.read_bytes()
    end = data.index(b"IEND") - 4
    path.write_bytes(data[:end] + chunk + data[end:])
    [sample] = read(tmp_path, "p")
    assert sample.size == (6, 8)
    assert sample.pixels((6, 8), (0.5, 0.5), False).shape == (8, 6, 3)


def test_errors_in_class_images_name_their_folder(images: Path, tmp_path: Path) -> None:
    class_folder = tmp_path / "class"
    class_folder.mkdir()
    Image.new("RGB", (40, 40)).save(class_folder / "a.png")
    (class_folder / "a.txt").write_bytes(b"\xff\xfe\xfa")
    data = Folder(path=str(images), class_path=str(class_folder), class_prompt=None)
    with pytest.raises(UserError, match=r"^data\.class_path: .*a\.txt is not UTF-8 text; save it as UTF-8"):
        data.read_class(str(class_folder))
    (class_folder / "a.txt").write_text("a dog", encoding="utf-8")
    (class_folder / "a.png").write_bytes((class_folder / "a.png").read_bytes()[:45])
    with pytest.raises(UserError, match=r"^data\.class_path: .*a\.png"):
        data.read_class(str(class_folder))
