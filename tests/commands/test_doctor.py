"""``sdtune doctor``: findings, and the remedies for what is wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from running import sdtune
from sdtune.commands import doctor


def test_machine_without_problems(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * 2**30))
    assert sdtune("doctor") == 0
    output = capsys.readouterr().out
    for name in ("sdtune", "Python", "torch", "CPU", "memory", "disk of outputs/", "cache", "packages"):
        assert f"\n{name}" in f"\n{output}"
    assert output.endswith("nothing is wrong with the installation\n")


def test_machine_without_gpu_is_told_what_it_can_train(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    sdtune("doctor")
    assert re.search("^GPU +none that torch can use. This machine can train pocket; ", capsys.readouterr().out, re.M)


def broken(name: str) -> dict[str, Any]:
    """Replacements of attributes of the module, by case."""
    usage = SimpleNamespace(free=2**30)
    return {
        "cpu build": {"_driver": lambda: "580.65"},
        "disk": {"shutil.disk_usage": lambda _: usage},
        "old version": {"version": lambda package: "0.0.1" if package == "diffusers" else "99"},
        "folder": {"os.access": lambda *_: False},
    }[name]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cpu build", "WRONG: there is an NVIDIA GPU, but torch is a build for CPUs; install a CUDA build"),
        ("disk", "WRONG: little space is left; free some: sdtune cache max_gib=N"),
        ("old version", "diffusers 0.0.1 is not >=0.36"),
        ("folder", "is not writable; start sdtune in another folder"),
    ],
)
def test_problem_is_named_with_a_remedy(
    case: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "cpu build" and torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build")
    for path, value in broken(case).items():
        monkeypatch.setattr(f"sdtune.commands.doctor.{path}", value)
    assert sdtune("doctor") == 1
    output = capsys.readouterr()
    assert message in output.out
    assert "findings need a remedy" in output.err


def test_unusable_cache_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "file" / "cache"))
    assert sdtune("doctor") == 1
    assert "WRONG: the cache folder" in capsys.readouterr().out


def test_version_of_the_driver_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert doctor._driver() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.65.06\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(program))
    assert doctor._driver() == "580.65.06"
    program.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    assert doctor._driver() is None
