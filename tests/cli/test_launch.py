"""Errors of a command on their way to the shell; imports without garbage collection."""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from sdtune.cli.launch import launch, lazy_command
from sdtune.config.targets import resolve
from sdtune.errors import UserError


def _library_error() -> None:
    json.loads("{")


def _sdtune_error() -> None:
    resolve("os.system", "data")


def _command(raises: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(config: DictConfig, job_folder: Path) -> Callable[[DictConfig], Any]:
        return lambda composed: raises()

    root = logging.getLogger()
    previous = root.handlers[:], root.level
    try:
        launch("train", [f"hydra.run.dir={folder}"], prepare)
    finally:
        root.handlers[:], root.level = previous  # remove the log handlers of the run


def test_user_error_of_sdtune_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        _command(_sdtune_error, tmp_path / "run", monkeypatch)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("sdtune: data._target_: os.system is not allowed")
    assert not (tmp_path / "run").exists()


def test_library_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(json.JSONDecodeError) as raised:  # a ValueError too
        _command(_library_error, tmp_path / "run", monkeypatch)
    assert raised.traceback[-1].path.name == "decoder.py"


def test_garbage_collector_skips_imported_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newly_imported.py").write_text(
        "import gc\nseen = gc.isenabled()\nprepare = lambda *_: seen\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    frozen_before = gc.get_freeze_count()
    try:
        assert lazy_command("newly_imported")(DictConfig({}), tmp_path) is False
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen_before
    finally:
        gc.unfreeze()  # also objects of other tests
        del sys.modules["newly_imported"]


def test_out_of_memory_on_the_device_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(SystemExit) as stop:
        _command(full, tmp_path / "run", monkeypatch)
    assert stop.value.code == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("sdtune: out of memory: end other programs, or use a machine with more memory")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "overrides"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, []),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, []),
        ({"NODE_RANK": "1"}, []),
        ({}, ["hardware.num_nodes=2"]),
    ],
)
def test_several_processes_without_run_folder_are_refused(
    environment: dict[str, str],
    overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as stop:
        launch("train", overrides, lambda *_: pytest.fail("prepared"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("sdtune: hydra.run.dir: required for several processes")


def test_default_folder_of_the_same_second_takes_the_next_free_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tasks of a scheduler's array."""
    folders: list[Path] = []

    def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], None]:
        assert folder.is_dir(), "another process can no longer take it"
        folders.append(folder)
        return lambda composed: None

    monkeypatch.setattr("sdtune.cli.launch.run_folder", lambda config: tmp_path / "lora" / "2026-01-31_12-00-00")
    for _ in range(3):
        launch("train", [], prepare)
    assert [folder.name for folder in folders] == [f"2026-01-31_12-00-00{end}" for end in ("", "-2", "-3")]
    assert all((folder / ".hydra" / "overrides.yaml").is_file() for folder in folders)


def test_default_folder_of_an_invalid_run_is_removed_with_its_new_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], None]:
        raise UserError("invalid", key="seed")

    monkeypatch.setattr("sdtune.cli.launch.run_folder", lambda config: tmp_path / "outputs" / "lora" / "now")
    with pytest.raises(SystemExit):
        launch("train", [], prepare)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
def test_stop_during_the_checks_is_one_line_and_leaves_no_folder(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
        signal.raise_signal(signal.SIGTERM)
        return lambda composed: None

    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        launch("train", argv, prepare)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "sdtune: stopped before the start; no run folder is left\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == previous
