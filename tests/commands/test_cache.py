"""``sdtune cache``: sizes, removal by age and size, and entries of running commands."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from running import sdtune
from sdtune.commands import cache
from sdtune.commands.cache import Entry, Removal, list_entries, to_remove
from sdtune.paths import cache_in_use, oldest_running

DAY = 24 * 3600


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    for name, size, days in (("latents/vae/a", 1024, 40), ("latents/vae/b", 2048, 1), ("class/x/0", 4096, 35)):
        file = tmp_path / "cache" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
        os.utime(file, (time.time() - days * DAY,) * 2)
    model = tmp_path / "cache" / "backbones" / "abc"
    (model / "unet").mkdir(parents=True)
    (model / "unet" / "weights").write_bytes(bytes(10_000))
    return tmp_path / "cache"


def names(folder: Path) -> set[str]:
    return {str(entry.path.relative_to(folder)) for entry in list_entries(folder)}


def test_sizes_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sdtune("cache") == 0
    output = capsys.readouterr().out
    assert output.startswith(f"cache: {folder}\n")
    assert "latents of images                           2" in output
    assert "total                                       4    0.02 MiB" in output
    assert len(names(folder)) == 4


def test_old_entries_are_removed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sdtune("cache", "older_than=30", "dry_run=true") == 0
    assert "would be removed: 2 entries" in capsys.readouterr().out
    assert len(names(folder)) == 4
    assert sdtune("cache", "older_than=30") == 0
    assert names(folder) == {"latents/vae/b", "backbones/abc"}
    assert sdtune("cache", "older_than=0") == 0
    assert names(folder) == set()


def test_least_recently_used_entries_are_removed_until_the_size_fits() -> None:
    entries = [Entry(Path(str(age)), "latents", 2**30, 1000.0 - age) for age in (1, 3, 2)]
    removed = to_remove(entries, Removal(max_gib=1.5), 1000.0, None)
    assert [entry.path.name for entry in removed] == ["3", "2"]
    assert to_remove(entries, Removal(max_gib=3), 1000.0, None) == []
    both = to_remove(entries, Removal(older_than=2.5 / DAY, max_gib=2), 1000.0, None)
    assert [entry.path.name for entry in both] == ["3"]


def test_entries_of_running_commands_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "print('on', flush=True); sys.stdin.read()"
    code = f"import sys\nfrom sdtune.paths import cache_in_use\nwith cache_in_use():\n  {body}"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        assert oldest_running(folder) is not None
        for used in ("latents/vae/b", "backbones/abc"):  # as the running command does when it uses them
            os.utime(folder / used)
        assert sdtune("cache", "older_than=0") == 0
        assert names(folder) == {"latents/vae/b", "backbones/abc"}
        assert "kept: 2 entries that a running command may use" in capsys.readouterr().out
        process.kill()
    assert oldest_running(folder) is None, "a killed process releases its lock"
    assert sdtune("cache", "older_than=0") == 0
    assert names(folder) == set()


def test_own_process_is_found_and_released(folder: Path) -> None:
    with cache_in_use():
        assert len(list((folder / "running").iterdir())) == 1
    assert oldest_running(folder) is None
    assert not (folder / "running").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("older_than=1d", "older_than: got '1d'; set a number of days, such as older_than=30"),
        ("max_gib=-1", "max_gib: got '-1'; set a number of GiB"),
        ("dry_run=1", "dry_run: got '1'; set dry_run=true or dry_run=false"),
        ("prune", "cache: unknown argument prune; use older_than=DAYS"),
    ],
)
def test_invalid_argument_is_refused(
    argument: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sdtune("cache", argument) == 2
    assert message in capsys.readouterr().err


def test_partial_and_locked_entries_are_kept(folder: Path) -> None:
    partial = folder / "backbones" / f"abc.{'0' * 32}.partial"
    partial.mkdir()
    (folder / "latents" / "vae" / f"c.{'0' * 32}.partial").touch()
    assert len(names(folder)) == 4
    with FileLock(folder / "backbones" / "abc.lock"):  # as while a model is converted
        assert sdtune("cache", "older_than=0") == 0
    assert names(folder) == {"backbones/abc"}
    assert partial.is_dir()


def test_entry_that_is_used_meanwhile_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = cache.oldest_running

    def used_meanwhile(path: Path) -> float | None:
        os.utime(folder / "latents" / "vae" / "a")
        return real(path)

    monkeypatch.setattr(cache, "oldest_running", used_meanwhile)
    assert sdtune("cache", "older_than=30") == 0
    assert "removed: 1 entries" in capsys.readouterr().out
    assert names(folder) == {"latents/vae/a", "latents/vae/b", "backbones/abc"}


def test_commands_register_and_leave_no_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "new" / "cache"))
    with cache_in_use():
        assert oldest_running(tmp_path / "new" / "cache") is not None
    assert not (tmp_path / "new").exists()
    assert sdtune("train", "method.rank=0") == 2
    assert not (tmp_path / "new" / "cache" / "running").exists()
