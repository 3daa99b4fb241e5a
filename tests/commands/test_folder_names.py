"""Folders of runs and sweeps can have any name: train, stop, resume, sweep and report."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path

import pytest

from running import arguments, rows, train
from sdtune.cli.main import main
from sdtune.quoting import override

NAME = "it's [1,2] a=b"


def without_run_folder(tiny: Path, images: Path, *more: str) -> list[str]:
    all_arguments = arguments(tiny, images, images, "callbacks.samples=null", "trainer.max_steps=3", *more)
    return [word for word in all_arguments if not word.startswith("hydra.run.dir")]


def test_stopped_run_continues_by_the_command_that_it_prints(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / NAME
    stop = ["trust=[running]", "+callbacks.stop={_target_: running.StopAt, step: 2}"]
    assert train(*without_run_folder(tiny, images, *stop), override("hydra.run.dir", run)) == 128 + signal.SIGTERM
    [command] = re.findall(r"continue it with: (sdtune train .*)", capsys.readouterr().err)
    assert train(*shlex.split(command)[2:]) == 0
    assert [row["step"] for row in rows(run)] == ["1", "2", "3"]
    assert train(f"resume={run}", "trainer.max_steps=4") == 0, "the path without quotes of Hydra's grammar"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path != images] == [NAME]


def test_sweep_is_resumed_and_reported(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tmp_path / NAME
    sweep_arguments = without_run_folder(tiny, images, "seed=0,1", "trainer.max_steps=1")
    assert train("-m", *sweep_arguments, override("hydra.sweep.dir", sweep)) == 0
    (sweep / "1" / "metrics.json").unlink()
    assert train("-m", override("resume", sweep)) == 0
    assert all((sweep / job / "metrics.json").is_file() for job in "01")
    monkeypatch.setattr("sys.argv", ["sdtune", "report", str(sweep)])
    main()
    assert (sweep / "report.html").is_file()
