"""Errors that a command prints as one line, their exit codes, and errors that are bugs."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import ConfigCompositionException

from running import arguments, train
from sdtune.cli.exit_codes import exit_codes
from sdtune.commands import train_run
from sdtune.errors import Pruned, RunFailed, Stopped, UserError

SHOWN: dict[str, tuple[BaseException, int, str]] = {
    "input": (UserError("3 is odd", key="data.batch_size", remedy="set 4"), 2, "data.batch_size: 3 is odd; set 4"),
    "stopped": (Stopped("stopped at step 3", 143), 143, "stopped at step 3"),
    "pruned": (Pruned(7), 4, "pruned at step 7"),
    "failed": (RunFailed("the loss\nis NaN"), 1, "the loss is NaN"),
    "memory": (torch.OutOfMemoryError("CUDA"), 1, "out of memory on the device"),
    "CPU memory": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
    "disk": (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 1, "/a/b: No space left on device"),
    "disk, while writing": (
        OSError(errno.ENOSPC, "No space left on device"),
        1,
        "output: No space left on device; choose",
    ),
    "connection": (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), 1, "Connection refused\n"),
    "MPS memory": (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), 1, "out of memory"),
    "Ctrl-C": (
        KeyboardInterrupt(),
        130,
        "stopped; if there is a checkpoint, continue it with: sdtune train resume=RUN",
    ),
}
BUGS: dict[str, Exception] = {
    "value": ValueError("zip() argument 2 is shorter than argument 1"),
    "runtime": RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    "of a library": json.JSONDecodeError("Expecting value", "", 0),
    "without errno": OSError("not a system's error"),
    "while nothing is composed": ConfigCompositionException("Could not override"),
}


@pytest.mark.parametrize(
    ("command", "advice"), [("sample", "sampling.batch_size=1"), ("prepare", "data.resolution"), ("export", "other")]
)
def test_out_of_memory_advice_depends_on_the_command(
    command: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), exit_codes(command):
        raise MemoryError
    assert advice in capsys.readouterr().err


def raising(error: BaseException) -> None:
    with exit_codes("sample"):
        raise error


@pytest.mark.parametrize("name", SHOWN)
def test_error_that_the_user_can_fix_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, words = SHOWN[name]
    with pytest.raises(SystemExit) as stop:
        raising(error)
    assert stop.value.code == code
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"sdtune: {words}")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("name", BUGS)
def test_any_other_error_passes_through_as_a_bug(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(BUGS[name])) as raised:
        raising(BUGS[name])
    assert raised.value is BUGS[name]
    assert capsys.readouterr().err == ""


def test_composition_error_is_invalid_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, exit_codes("train", lambda error: f"composing: {error}"):
        raise BUGS["while nothing is composed"]
    assert stop.value.code == 2
    assert capsys.readouterr().err == "sdtune: composing: Could not override\n"


@pytest.mark.parametrize(("error", "code"), [(Pruned(3), 0), (RunFailed("all know it", agreed=True), 0),
                                             (RunFailed("one knows it"), 1)])  # fmt: skip
def test_only_process_0_prints_an_error_that_all_processes_know(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    exit_code = 0
    try:
        raising(error)
    except SystemExit as stop:
        exit_code = int(str(stop.code))
    assert exit_code == code
    assert (capsys.readouterr().err == "") is (code == 0)


def test_environment_variable_enables_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDTUNE_TRACEBACK", "1")
    with pytest.raises(UserError):
        raising(UserError("wrong"))
    with pytest.raises(SystemExit):
        raising(Stopped("stopped", 143))


BUG = """
import sys
from sdtune.commands import train_run
def broken(*_, **__):
    list(zip([1], [1, 2], strict=True))
train_run.TrainRun.build_trainer = broken
sys.argv = ["sdtune", *sys.argv[1:]]
from sdtune.cli.main import main
main()
"""


def test_bug_in_a_training_keeps_run_folder_and_traceback(tiny: Path, images: Path, tmp_path: Path) -> None:
    words = arguments(tiny, images, tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", BUG, "train", *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "ValueError: zip() argument 2 is longer than argument 1" in done.stderr
    assert (tmp_path / "run" / ".hydra" / "config.yaml").is_file()


def test_bug_in_a_job_of_a_sweep_writes_its_traceback_to_the_job_folder(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        list(zip([1], [1, 2], strict=True))

    monkeypatch.setattr(train_run.TrainRun, "build_trainer", broken)
    words = [word for word in arguments(tiny, images, tmp_path) if not word.startswith("hydra.run.dir")]
    assert train("-m", *words, "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep") == 1
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    for job in "01":
        folder = tmp_path / "sweep" / job
        state: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        assert state["error"] == "ValueError: zip() argument 2 is longer than argument 1"
        assert state["traceback"] == "error.log"
        assert "in broken" in (folder / "error.log").read_text(encoding="utf-8")
        assert f"its traceback is in {folder}/error.log" in errors


def test_user_error_keeps_its_fields() -> None:
    error = UserError("3 is odd", key="data.batch_size", remedy="set 4")
    assert (error.key, error.remedy) == ("data.batch_size", "set 4")
    assert str(UserError("it is odd")) == "it is odd"
