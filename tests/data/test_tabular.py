"""One data set as folder, parquet, tars, datasets folder, CSV and JSONL: the same rows, batches and fingerprint."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from image_data import batches, equal, noise
from sdtune.commands.index import index, main, parse
from sdtune.data import Table
from sdtune.data.datamodule import ImageDataModule
from sdtune.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (width, height) in enumerate([(64, 64), (96, 64), (64, 96), (64, 64), (96, 64), (80, 80)]):
        noise(tmp_path / "images" / f"{number:03d}.png", width, height, seed=number, caption=f"dog, number {number}")
    return tmp_path / "images"


def records(folder: Path) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": file.read_bytes(), "path": file.name}, "text": file.with_suffix(".txt").read_text("utf-8")}
        for file in sorted(folder.glob("*.png"))
    ]


def as_parquet(folder: Path, target: Path) -> list[Path]:
    rows = records(folder)
    for number, part in enumerate((rows[:4], rows[4:])):
        pq.write_table(pa.Table.from_pylist(part), target / f"part-{number}.parquet")
    return sorted(target.glob("*.parquet"))


def as_tars(folder: Path, target: Path) -> list[Path]:
    for number, files in enumerate((sorted(folder.glob("*.png"))[:4], sorted(folder.glob("*.png"))[4:])):
        with tarfile.open(target / f"{number}.tar", "w") as archive:
            link = tarfile.TarInfo("evil.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
            for file in files:
                archive.add(file, file.name)
                archive.add(file.with_suffix(".txt"), file.with_suffix(".txt").name)
    return sorted(target.glob("*.tar"))


def as_datasets(folder: Path, target: Path) -> list[Path]:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(records(folder), features=features).save_to_disk(target / "saved")
    return [target / "saved"]


def as_jsonl(folder: Path, target: Path) -> list[Path]:
    lines = [
        json.dumps({"file_name": str(file), "captions": [file.with_suffix(".txt").read_text("utf-8")]})
        for file in sorted(folder.glob("*.png"))
    ]
    (target / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [target / "data.jsonl"]


def as_csv(folder: Path, target: Path) -> list[Path]:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file_name", "text"])
    for file in sorted(folder.glob("*.png")):
        writer.writerow([f"../images/{file.name}", file.with_suffix(".txt").read_text("utf-8")])
    (target / "data.csv").write_text(text.getvalue(), encoding="utf-8")
    return [target / "data.csv"]


def opened_table(file: Path, **settings: Any) -> ImageDataModule:
    data = Table(path=str(file), **{"cache_latents": False, "cache_text": False, "batch_size": 2, **settings})
    data.open(64, 4)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=1,
        max_steps=9,
        global_step=0,
        global_rank=0,
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


PYTHON = [sys.executable]
KINDS = [as_parquet, as_tars, as_datasets, as_jsonl, as_csv]


@pytest.mark.parametrize("convert", KINDS, ids=lambda f: f.__name__)
def test_every_kind_of_source_gives_the_batches_of_the_folder(
    folder: Path, tmp_path: Path, convert: Callable[[Path, Path], list[Path]]
) -> None:
    (tmp_path / "converted").mkdir()
    sources = convert(folder, tmp_path / "converted")
    index(parse([str(folder), f"out={tmp_path / 'folder.arrow'}"]))
    index(parse([*map(str, sources), f"out={tmp_path / 'other.arrow'}"]))
    reference, data = (opened_table(tmp_path / name) for name in ("folder.arrow", "other.arrow"))
    assert equal(batches(data), batches(reference))
    assert data.fingerprint == reference.fingerprint
    assert [s.content() for s in data.train] == [s.content() for s in reference.train]


def test_images_of_datasets_and_tars_are_read_in_place(folder: Path, tmp_path: Path) -> None:
    for convert in (as_datasets, as_tars):
        target = tmp_path / convert.__name__
        target.mkdir()
        index(parse([*map(str, convert(folder, target)), f"out={target / 'table.arrow'}"]))
        assert not (target / "table.arrow.shards").exists()


def test_bytes_of_parquet_are_copied_once(folder: Path, tmp_path: Path) -> None:
    request = parse([*map(str, as_parquet(folder, tmp_path)), f"out={tmp_path / 'table.arrow'}"])
    index(request)
    copies = {file: file.stat().st_mtime_ns for file in (tmp_path / "table.arrow.shards").glob("*.bin")}
    assert sum(file.stat().st_size for file in copies) == sum(f.stat().st_size for f in folder.glob("*.png"))
    index(request)
    assert copies == {file: file.stat().st_mtime_ns for file in (tmp_path / "table.arrow.shards").glob("*.bin")}


def test_masks_maps_lists_and_weights_of_parquet_are_read(folder: Path, tmp_path: Path) -> None:
    rows = records(folder)[:2]
    mask, white = (noise(tmp_path / f"{name}.png", 64, 64, seed=9).read_bytes() for name in ("mask", "white"))
    rows = [
        {
            "jpg": row["image"]["bytes"],
            "captions": [row["text"], "another"],
            "weights": [1.0, 3.0],
            "sentence": "A dog.",
            "repeats": 2,
            "mask": mask if number == 0 else None,
            "conditioning_image": white,
        }
        for number, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    table = index(parse([str(tmp_path / "rows.parquet"), f"out={tmp_path / 'table.arrow'}"]))
    first, second = table.row(0), table.row(1)
    assert first.captions == ("dog, number 0", "another")
    assert (first.weights, first.sentences, first.repeats) == ((1.0, 3.0), ("A dog.",), 2)
    assert first.mask is not None
    assert first.mask.place.read() == mask
    assert second.mask is None
    assert second.control is not None
    assert second.control.place.read() == white


def test_columns_of_other_names_are_set(folder: Path, tmp_path: Path) -> None:
    rows = [{"picture": row["image"]["bytes"], "words": row["text"]} for row in records(folder)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    arguments = [str(tmp_path / "rows.parquet"), f"out={tmp_path / 'table.arrow'}"]
    with pytest.raises(UserError, match=r"^image_column: no column of images in .*: it has picture, words; set"):
        index(parse(arguments))
    with pytest.raises(UserError, match=r"^caption_column: .* has no column word; use one of picture, words"):
        index(parse([*arguments, "image_column=picture", "caption_column=word"]))
    table = index(parse([*arguments, "image_column=picture", "caption_column=words"]))
    assert table.row(3).captions == ("dog, number 3",)


def test_damaged_images_of_all_sources_are_listed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = records(folder)
    rows[2]["image"]["bytes"] = b"text"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:200])
    main([str(folder), str(tmp_path / "rows.parquet"), f"out={tmp_path / 'table.arrow'}"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged: ")]
    assert len(lines) == 2
    assert "001.png is not a readable image" in lines[0]
    assert ".bin at byte" in lines[1]
    with pytest.raises(UserError, match=r"^data\.path: 2 of 12 images are damaged"):
        opened_table(tmp_path / "table.arrow")
    assert len(opened_table(tmp_path / "table.arrow", damaged="skip").train) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=a.arrow"], "index: no source; name a folder or file"),
        (["gone", "out=a.arrow"], "index: gone does not exist; name a folder or file"),
        (["{images}"], "out: missing value; set a file for the table, such as out=images.arrow"),
        (["{images}", "out=a.csv"], r"out: .*a\.csv is no name for a table; end the name in \.arrow"),
        (["{images}", "out=a.arrow", "rehash=yes"], "rehash: got 'yes'; set true or false"),
        (["{images}", "out=a.arrow", "columns=x"], "index: unknown setting columns; sdtune index --help lists"),
        (["*.tar", "out=a.arrow"], r"index: no file matches \*\.tar; correct the pattern"),
    ],
)
def test_invalid_arguments_are_refused(folder: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        parse([argument.format(images=folder) for argument in arguments])


def test_invalid_sources_are_refused(folder: Path, tmp_path: Path) -> None:
    def refused(name: str, content: str | bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=message):
            index(parse([str(tmp_path / name), f"out={tmp_path / 'table.arrow'}"]))
        assert not (tmp_path / "table.arrow").exists()

    refused("a.zip", b"", r"^index: .*a\.zip is of an unknown kind; use a folder, \.parquet")
    refused("a.parquet", b"text", r"^index: .*a\.parquet is not a parquet file")
    refused("a.jsonl", '{"file_name": "x.png"}\n{', r"^index: .*a\.jsonl: Expecting")
    refused("b.jsonl", "[1]\n", r"^index: .*b\.jsonl, line 1: not a JSON object; correct this row")
    refused("c.jsonl", '{"file_name": 3}\n', r"^index: .*c\.jsonl, line 1: got '3' as file_name; use a path")
    refused("d.jsonl", '{"file_name": "a.png", "text": 3}\n', r"^index: d\.jsonl, line 1: got '3' as caption")
    refused("e.tar", b"text", r"^index: .*e\.tar is not an uncompressed tar")
    weighted = '{"file_name": "a.png", "captions": ["x", "y"], "weights": %s}\n'
    for weights in ("[0, 0]", "[-1, 2]", '["q", 1]', "[1]"):
        refused(
            "g.jsonl", weighted % weights, r"^index: g\.jsonl, line 1: got .* as weights of 2 captions; use one number"
        )
    refused("h.csv", "file_name,text,repeats\na.png,x,-3\n", r"^index: h\.csv, line 2: got -3 as repeats")
    refused("f.csv", "file_name,text\n,x\n", r"^index: f\.csv, line 2 has no image; remove this row")


def tar_bytes(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_bytes(a__png=b"x", a__json=b"{"), r"t\.tar, a\.json: Expecting .*; correct this file"),
        (tar_bytes(a__png=b"x", a__json=b"[1]"), r"t\.tar, a\.json: not a JSON object; correct this file"),
        (tar_bytes(a__png=b"x", a__txt=b"\xff"), r"t\.tar, a\.txt: .*; correct this file"),
        (tar_bytes(a__png=b"x", b__png=b"y")[:1024], r"t\.tar is cut off .*; copy or make it again"),
    ],
)
def test_damaged_tars_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.tar").write_bytes(content)
    with pytest.raises(UserError, match=f"^index: .*{message}"):
        index(parse([str(tmp_path / "t.tar"), f"out={tmp_path / 'table.arrow'}"]))


def test_image_that_was_edited_after_indexing_is_refused(folder: Path, tmp_path: Path) -> None:
    index(parse([str(folder), f"out={tmp_path / 'table.arrow'}"]))
    data = opened_table(tmp_path / "table.arrow")
    sample = data.train[0]
    original = sample.pixels((64, 64), (0.5, 0.5), False)
    os.utime(folder / "000.png", ns=(1, 1))  # a copy without its time has the same bytes
    assert np.array_equal(sample.pixels((64, 64), (0.5, 0.5), False), original)
    noise(folder / "000.png", 64, 64, seed=55)
    with pytest.raises(UserError, match=r"^data\.path: .*000\.png has changed since it was indexed; run sdtune index"):
        sample.pixels((64, 64), (0.5, 0.5), False)


@pytest.mark.slow
def test_killed_index_continues(folder: Path, tmp_path: Path) -> None:
    """The journal of a killed process keeps what it has read; the finished table equals that of one call."""
    for number in range(200):
        (folder / f"more-{number:04d}.png").symlink_to(folder / "000.png")
        (folder / f"more-{number:04d}.txt").write_text("a dog", encoding="utf-8")
    out = tmp_path / "table.arrow"
    code = (
        "import os, sys\nfrom sdtune.data import indexing\nindexing._ROWS_AT_ONCE = 64\n"
        "read, calls = indexing.read_image, []\n"
        "def stops(image, role):\n    calls.append(image)\n    if len(calls) > 140: os._exit(9)\n"
        "    return read(image, role)\nindexing.read_image = stops\n"
        "from sdtune.commands.index import main\nmain(sys.argv[1:])\nprint(len(calls))\n"
    )
    command = [str(folder), f"out={out}"]
    assert subprocess.run([*PYTHON, "-c", code, *command], capture_output=True, check=False).returncode == 9
    assert not out.exists()
    assert len(list((tmp_path / "table.arrow.journal").glob("*.arrow"))) == 2
    done = subprocess.run([*PYTHON, "-c", code, *command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(206 - 128)
    assert not (tmp_path / "table.arrow.journal").exists()
    complete = index(parse([str(folder), f"out={tmp_path / 'complete.arrow'}"]))
    assert opened_table(out).fingerprint == opened_table(tmp_path / "complete.arrow").fingerprint
    assert len(complete) == 206


def test_changed_images_alone_are_read_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdtune.data import indexing

    request = parse([str(folder), f"out={tmp_path / 'table.arrow'}"])
    index(request)
    read: list[str] = []
    original = indexing.read_image
    monkeypatch.setattr(
        indexing, "read_image", lambda image, role: (read.append(image.place.file.name), original(image, role))[1]
    )
    noise(folder / "002.png", 64, 96, seed=77)
    noise(folder / "007.png", 64, 64, seed=78, caption="dog, number 7")
    assert len(index(request)) == 7
    assert sorted(read) == ["002.png", "007.png"]
    index(parse([str(folder), f"out={tmp_path / 'table.arrow'}", "rehash=true"]))
    assert len(read) == 2 + 7


def test_table_moved_with_its_images_is_still_read(folder: Path, tmp_path: Path) -> None:
    index(parse([str(folder), f"out={tmp_path / 'table.arrow'}"]))
    pixels = opened_table(tmp_path / "table.arrow").train[0].pixels((64, 64), (0.5, 0.5), False)
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved" / "images")
    (tmp_path / "table.arrow").rename(tmp_path / "moved" / "table.arrow")
    moved = opened_table(tmp_path / "moved" / "table.arrow")
    assert np.array_equal(moved.train[0].pixels((64, 64), (0.5, 0.5), False), pixels)


def test_other_files_are_refused_as_tables(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.path: .*images is a folder; use data=folder, or set the file"):
        opened_table(folder)
    with pytest.raises(UserError, match=r"^data\.path: .*gone\.arrow does not exist; set the file that sdtune index"):
        opened_table(tmp_path / "gone.arrow")
    (tmp_path / "text.arrow").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match=r"^data\.path: .*text\.arrow is not a table of samples; set the file"):
        opened_table(tmp_path / "text.arrow")
    pa.ipc.new_file(str(tmp_path / "other.arrow"), pa.schema([("a", pa.int32())])).close()
    with pytest.raises(UserError, match=r"^data\.path: .*other\.arrow is not a table of this version"):
        opened_table(tmp_path / "other.arrow")
