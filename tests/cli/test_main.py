"""The command ``sdtune``: help, completion, and speed of answers without torch."""

from __future__ import annotations

import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from sdtune.cli.main import main


def sdtune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sdtune", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments", [("--help",), ("train", "--help"), ("train", "--cfg", "job"), ("train", "methd.rank=4")]
)
def test_help_config_and_misspelled_key_need_little_cpu_time(arguments: tuple[str, ...]) -> None:
    best = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = sdtune(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # CPU time instead of wall time, so that a busy machine does not fail the test.
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < 1.5
    refused = "methd.rank=4" in arguments
    assert done.returncode == (2 if refused else 0)
    output = "methd.rank: unknown setting; did you mean method.rank?" if refused else "method"
    assert output in done.stdout + done.stderr


def test_help_names_every_command() -> None:
    output = sdtune("--help").stdout
    assert all(name in output for name in ("train", "prepare", "sample", "plan", "evaluate"))


def test_unknown_command_is_refused_with_a_suggestion() -> None:
    done = sdtune("trian")
    assert done.returncode == 2
    assert done.stderr.strip() == "sdtune: trian: unknown command; did you mean train?"


def test_python_m_sdtune_equals_the_sdtune_command() -> None:
    command = subprocess.run(
        [str(Path(sys.executable).with_name("sdtune")), "train", "--cfg", "job"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert command.stdout == sdtune("train", "--cfg", "job").stdout


def test_version_of_a_command_is_that_of_sdtune(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["--version"], ["train", "--version"]):
        monkeypatch.setattr(sys, "argv", ["sdtune", *arguments])
        main()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second == version("sdtune")
