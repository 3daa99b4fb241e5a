"""``sdtune caption`` from the command line: files, resuming, damaged images, and refused settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caption_models import build_blip, build_tagger, save_photos
from running import sdtune
from sdtune.data import Folder

COUNT = 30


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tagger(tmp_path_factory.mktemp("models") / "tagger")


def caption(folder: Path, model: Path | str, *more: str) -> int:
    return sdtune("caption", f"data.path={folder}", f"model={model}", "hardware=cpu", "max_new_tokens=8", *more)


def texts(folder: Path) -> dict[str, str]:
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.txt"))}


def test_captions_are_read_by_the_data_source(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_photos(tmp_path / "photos", 5)
    (folder / "01.caption").write_text("mine", encoding="utf-8")
    assert sdtune("caption", str(folder), f"model={blip}", "hardware=cpu", "max_new_tokens=8", "prefix=sks, my") == 0
    captions = {Path(str(sample)).stem: sample.caption for sample in Folder(path=str(folder)).read()[0]}
    assert captions["01"] == "mine"
    assert not (folder / "01.txt").exists()
    assert all(captions[f"{i:02d}"].startswith("sks, my ") for i in (0, 2, 3, 4))
    assert len(set(captions.values())) > 3
    assert capsys.readouterr().out.splitlines() == [
        f"4 captions written in {folder}",
        "skipped 1 image that already has a caption; overwrite=true replaces them",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["photos"], "no run folder"


def test_captions_do_not_depend_on_the_batch_size(blip: Path, tmp_path: Path) -> None:
    folders = [save_photos(tmp_path / str(size), 5) for size in (1, 3)]
    for folder in folders:
        assert caption(folder, blip, f"batch_size={folder.name}", "prompt=a photo of") == 0
    assert texts(folders[0]) == texts(folders[1])
    assert all(text.startswith("a photo of ") for text in texts(folders[0]).values())


def test_overwrite_replaces_captions_only_if_set(blip: Path, tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos", 2)
    for name in ("00.txt", "01.caption"):
        (folder / name).write_text("mine", encoding="utf-8")
    assert caption(folder, "/nowhere") == 2
    assert caption(folder, blip) == 0
    assert (folder / "00.txt").read_text(encoding="utf-8") == (folder / "01.caption").read_text(encoding="utf-8")
    assert caption(folder, blip, "overwrite=true") == 0
    assert "mine" not in ((folder / name).read_text(encoding="utf-8") for name in ("00.txt", "01.caption"))
    assert sorted(path.name for path in folder.iterdir()) == ["00.png", "00.txt", "01.caption", "01.png"]


def test_complete_folder_needs_no_model_in_memory(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_photos(tmp_path / "photos", 2)
    assert caption(folder, blip) == 0
    monkeypatch.setattr("sdtune.commands.caption.Captioner", None)
    assert caption(folder, blip) == 0
    assert "0 captions written" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_command_continues_with_the_missing_captions(blip: Path, tmp_path: Path) -> None:
    options = ["hardware=cpu", "max_new_tokens=60", "batch_size=2", f"model={blip}"]
    uninterrupted, folder = (save_photos(tmp_path / name, COUNT) for name in ("uninterrupted", "killed"))
    assert sdtune("caption", f"data.path={uninterrupted}", *options) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "sdtune", "caption", f"data.path={folder}", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        while len(texts(folder)) < 4:
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = {file: file.stat().st_mtime_ns for file in folder.glob("*.txt")}
    assert 4 <= len(finished) < COUNT
    assert all(file.read_text(encoding="utf-8") == texts(uninterrupted)[file.stem] for file in finished)
    assert sdtune("caption", f"data.path={folder}", *options) == 0
    assert texts(folder) == texts(uninterrupted)
    assert len(texts(folder)) == COUNT
    assert {file: file.stat().st_mtime_ns for file in finished} == finished


def test_stopped_command_says_how_to_continue(blip: Path, tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos", COUNT)
    process = subprocess.Popen(
        [sys.executable, "-m", "sdtune", "caption", str(folder), f"model={blip}", "hardware=cpu", "batch_size=1"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not texts(folder):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "sdtune: stopped by SIGINT; the same command continues with the images without a caption\n"
    assert not list(folder.glob("*.partial"))


def test_damaged_images_are_listed_and_the_others_get_captions(
    blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_photos(tmp_path / "photos", 6)
    (folder / "01.png").write_bytes(b"nothing")
    (folder / "04.png").write_bytes((folder / "04.png").read_bytes()[:400])
    assert caption(folder, blip, "batch_size=2") == 1
    out, err = capsys.readouterr()
    assert list(texts(folder)) == ["00", "02", "03", "05"]
    assert out.startswith("4 captions written in ")
    lines = err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{folder}/01.png is not a readable image (")
    assert lines[1].startswith(f"{folder}/04.png is not a readable image (")
    assert lines[2] == (
        "sdtune: images without a caption, because they cannot be read: 2 of 6; repair or remove them, and run the same"
        " command again"
    )


def test_folder_with_only_damaged_images_is_reported(blip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"nothing")
    assert caption(folder, blip) == 1


def test_tags_are_written_with_the_settings(tagger: Path, tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos", 3)
    options = ["general_threshold=0", "character_threshold=0", "remove_underscore=true", "use_rating_tags=true"]
    arguments = [f"data.path={folder}", f"model={tagger}", "hardware=cpu", *options, "undesired_tags=green_hair"]
    assert sdtune("caption", *arguments, "prefix=sks,", "character_tags_first=true") == 0
    for text in texts(folder).values():
        rating, rest = text.removeprefix("sks, ").split(", ", 1)
        assert rating in ("general", "explicit")
        assert rest == "red fox (hero), blue sky, ^_^"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["max_new_tokens=0"], "max_new_tokens: got 0; expected int >= 1"),
        (["batch_size=0"], "batch_size: got 0; expected int >= 1"),
        (["general_threshold=2"], "general_threshold: got 2; expected float >= 0, <= 1"),
        (["overwrite=maybe"], 'overwrite: got "maybe"; expected true or false'),
        (["data.path=5"], "data.path: got 5; expected text"),
        (["general_threshold=0.5"], "general_threshold: applies only to taggers; remove it for a captioning model"),
        (["bath_size=3"], "bath_size: unknown setting; did you mean batch_size?"),
        (["-m", "batch_size=1,2"], "--multirun: sdtune caption supports no sweeps; remove --multirun"),
        (["hardware.precision=fp16"], "hardware.precision: 'fp16' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_setting_is_refused_in_one_line(
    settings: list[str], line: str, blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_photos(tmp_path / "photos", 1)
    assert caption(folder, blip, *settings) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith(f"sdtune: {line}")
    assert texts(folder) == {}


def test_setting_of_captioning_models_is_refused_for_a_tagger(
    tagger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_photos(tmp_path / "photos", 1)
    assert sdtune("caption", str(folder), f"model={tagger}", "hardware=cpu", "prompt=a photo of") == 2
    assert capsys.readouterr().err == "sdtune: prompt: applies only to captioning models; remove it for a tagger\n"
