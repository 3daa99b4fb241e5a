"""Atomic writes of files and folders."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sdtune.errors import UserError
from sdtune.exporting import find_artifact
from sdtune.files import read_yaml, remove_leftovers, replacing, write_json
from sdtune.formats import write_safetensors


@pytest.fixture
def umask() -> Iterator[None]:
    previous = os.umask(0o027)
    yield
    os.umask(previous)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    with replacing(file) as partial:
        partial.write_text("new", encoding="utf-8")
        assert not file.exists()
        assert partial.parent == file.parent
    assert file.read_text(encoding="utf-8") == "new"
    assert names(file.parent) == ["a.txt"]


@pytest.mark.parametrize("sync", [True, False])
def test_failed_write_keeps_the_old_file_or_folder(sync: bool, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.txt", tmp_path / "folder"
    file.write_text("old", encoding="utf-8")
    folder.mkdir()
    (folder / "b").write_text("old", encoding="utf-8")

    def write_half(path: Path) -> None:
        with replacing(path, sync=sync) as partial:
            if path is folder:
                partial.mkdir()
            (partial / "b" if path is folder else partial).write_text("half", encoding="utf-8")
            raise RuntimeError

    for path in (file, folder):
        with pytest.raises(RuntimeError):
            write_half(path)
    assert (file.read_text(encoding="utf-8"), (folder / "b").read_text(encoding="utf-8")) == ("old", "old")
    assert names(tmp_path) == ["a.txt", "folder"]


def test_folder_replaces_a_folder_completely(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in ("old", "new"):
        with replacing(folder) as partial:
            (partial / "deep").mkdir(parents=True)
            (partial / "deep" / name).touch()
    assert names(folder / "deep") == ["new"]
    assert names(tmp_path) == ["folder"]


def test_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kept").touch()
    with pytest.raises(OSError), replacing(tmp_path / "a") as partial:
        partial.touch()
    assert names(tmp_path / "a") == ["kept"]
    assert names(tmp_path) == ["a"]


@pytest.mark.usefixtures("umask")
def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    """safetensors creates files with mode 0600, which other users cannot read."""
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {})
    with replacing(tmp_path / "folder") as partial:
        write_safetensors(partial / "b.safetensors", {"x": torch.zeros(2)}, {})
        (partial / "c").touch(mode=0o600)
        (partial / "deep").mkdir(mode=0o700)
    folder = tmp_path / "folder"
    for file in (tmp_path / "a.safetensors", folder / "b.safetensors", folder / "c"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "deep")} == {0o750}


def test_symlinks_are_kept_and_their_targets_unchanged(tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.touch(mode=0o600)
    with replacing(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "link").symlink_to(target)
    assert (tmp_path / "folder" / "link").is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["a: !!bool 'x'", "a: [", "\0", "a: !!python/object:os.system x"])
def test_damaged_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"^resume: .*config\.yaml cannot be read \(.*\); restore it from a copy$"):
        read_yaml(tmp_path / "config.yaml", "resume")


def test_partial_files_of_killed_processes_are_removed_after_an_hour(tmp_path: Path) -> None:
    old, fresh, other = (tmp_path / f"{name}.{16 * 'ab'}.partial" for name in ("a.txt", "a.txt", "b.txt"))
    fresh = fresh.with_name(f"a.txt.{16 * 'cd'}.partial")
    unrelated = tmp_path / "a.txt.mine.partial"
    folder = tmp_path / f"a.txt.{16 * 'ef'}.partial"
    folder.mkdir()
    (folder / "inside").touch()
    for path in (old, fresh, other, unrelated):
        path.touch()
    for path in (old, other, unrelated, folder, folder / "inside"):
        os.utime(path, (time.time() - 3700,) * 2)
    with replacing(tmp_path / "a.txt") as partial:
        partial.touch()
    assert names(tmp_path) == sorted(["a.txt", fresh.name, other.name, unrelated.name])


def test_partial_folder_with_recent_files_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / f"a.{16 * 'ef'}.partial"
    folder.mkdir()
    (folder / "inside").touch()
    os.utime(folder, (time.time() - 3700,) * 2)
    with replacing(tmp_path / "a") as partial:
        partial.mkdir()
    assert names(tmp_path) == ["a", folder.name]


def test_threads_can_write_the_same_file(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            write_json(tmp_path / "a.json", [number] * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))  # raises the exceptions of the threads
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert content in [[number] * 1000 for number in range(4)]
    assert names(tmp_path) == ["a.json"]


def test_value_that_json_cannot_represent_is_refused_and_the_file_unchanged(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": 1}


def test_all_files_and_folders_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, synced = tmp_path / "folder", []
    real = os.fsync

    def record_fsync(handle: int) -> None:
        synced.append((Path(f"/proc/self/fd/{handle}").readlink().name.partition(".")[0], folder.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", record_fsync)
    for sync in (False, True):
        with replacing(folder, sync=sync) as partial:
            (partial / "deep").mkdir(parents=True)
            (partial / "deep" / "file").touch()
        assert sorted(synced) == (
            [("deep", False), ("file", False), ("folder", False), (tmp_path.name, True)] if sync else []
        )
        shutil.rmtree(folder)


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_interruption_between_two_renames_restores_the_old_folder(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()

    def write() -> None:
        with replacing(folder) as partial:
            partial.mkdir()

    def stopped(*_: object) -> None:
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        with pytest.raises(stop):
            write()
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_folder_that_a_killed_process_moved_aside_is_restored(tmp_path: Path) -> None:
    aside = tmp_path / f"folder.{16 * 'ab'}.replaced"
    aside.mkdir()
    (aside / "old").touch()
    os.utime(aside, (0, 0))

    def fail() -> None:
        with replacing(tmp_path / "folder"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path / "folder") == ["old"]
    assert names(tmp_path) == ["folder"]


def test_single_writer_removes_partial_files_immediately(tmp_path: Path) -> None:
    (tmp_path / f"a.{16 * 'ab'}.partial").touch()
    with replacing(tmp_path / "a", alone=True) as partial:
        partial.touch()
    assert names(tmp_path) == ["a"]


def test_leftovers_below_a_folder_are_removed(tmp_path: Path) -> None:
    code = 16 * "ab"
    folder = tmp_path / "artifact"
    for name in ("a", "b"):
        (folder / f"{name}.{code}.partial" / f"c.{code}.partial").mkdir(parents=True)
    for name in (f"a.{code}.replaced", f"moved.{code}.replaced", "a", "my.partial"):
        (folder / name).mkdir()
    (tmp_path / f"d.json.{code}.partial").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["artifact"]
    assert sorted(names(folder)) == ["a", f"moved.{code}.replaced", "my.partial"]


@pytest.mark.parametrize("letter", ["a", "\u6f22"])
def test_files_with_long_names_are_written(letter: str, tmp_path: Path) -> None:
    file = tmp_path / (letter * (250 // len(letter.encode())))
    write_json(file, 1)
    assert list(tmp_path.iterdir()) == [file]


def test_partial_file_that_cannot_be_removed_does_not_prevent_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = tmp_path / f"a.{16 * 'ab'}.partial"
    leftover.touch()
    lstat = Path.lstat

    def refused(path: Path) -> os.stat_result:
        if path == leftover:
            raise PermissionError
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", refused)
    write_json(tmp_path / "a", 1)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "1\n"


def test_symlink_to_a_folder_is_kept_and_its_target_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing(tmp_path / "link") as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]


def test_partial_folder_is_not_an_artifact(tmp_path: Path) -> None:
    leftover = tmp_path / f"cat.{16 * 'ab'}.partial"
    leftover.mkdir()
    (leftover / "model_index.json").touch()
    with pytest.raises(UserError, match="no LoRA, embedding, ControlNet or model in"):
        find_artifact(tmp_path, "run")
