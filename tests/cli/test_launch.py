"""What becomes of an error between a command and the shell."""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from sdtune.cli.launch import launch, lazy_command
from sdtune.config.targets import resolve


def _library() -> None:
    json.loads("{")


def _own() -> None:
    resolve("os.system", "data")


def _command(raises: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(config: DictConfig, place: Path) -> Callable[[DictConfig], Any]:
        return lambda composed: raises()

    root = logging.getLogger()
    kept = root.handlers[:], root.level
    try:
        launch("train", [f"hydra.run.dir={folder}"], prepare)
    finally:
        root.handlers[:], root.level = kept  # the run's log goes with its folder


def test_our_own_refusal_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        _command(_own, tmp_path / "run", monkeypatch)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("sdtune: data._target_: os.system is not allowed")
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_library_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(json.JSONDecodeError) as raised:  # a ValueError too
        _command(_library, tmp_path / "run", monkeypatch)
    assert raised.traceback[-1].path.name == "decoder.py"


def test_the_collector_does_not_look_at_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newly_imported.py").write_text("import gc\nseen = gc.isenabled()\nprepare = lambda *_: seen\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    try:
        assert lazy_command("newly_imported")(DictConfig({}), tmp_path) is False
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()  # of what the other tests have left
        del sys.modules["newly_imported"]


def test_a_device_that_is_full_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(SystemExit) as stop:
        _command(full, tmp_path / "run", monkeypatch)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("sdtune: out of memory: end other programs, or choose a machine with more")
    assert said.count("\n") == 1


def test_torchruns_processes_must_be_told_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as stop:
        launch("train", [], lambda *_: pytest.fail("prepared"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("sdtune: hydra.run.dir is missing: under torchrun")
