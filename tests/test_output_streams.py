"""Output that cannot be written never ends a run, and characters that the terminal lacks are escaped."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from running import arguments, rows


def command(tiny: Path, images: Path, run: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sdtune", "train", *arguments(tiny, images, run, *more)]


def test_run_whose_pipe_is_closed_is_completed(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(tiny, images, run, "trainer.max_steps=3"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(120) == 0
    assert (run / "metrics.json").is_file()


@pytest.mark.slow
def test_run_whose_terminal_is_closed_is_completed(tiny: Path, images: Path, tmp_path: Path) -> None:
    """With SIGHUP ignored, as under nohup."""
    run, (master, slave) = tmp_path / "run", pty.openpty()
    process = subprocess.Popen(
        command(tiny, images, run, "trainer.max_steps=60"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    os.close(slave)
    output, deadline = b"", time.monotonic() + 120
    while b"Training" not in output:
        assert time.monotonic() < deadline
        output += os.read(master, 4096)
    os.close(master)
    assert process.wait(120) == 0
    assert len(rows(run)) == 60
    assert (run / "metrics.json").is_file()


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_into_a_closed_pipe_prints_no_error(argument: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "sdtune", argument], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_run_in_an_ascii_locale_writes_its_card_in_utf_8(tiny: Path, images: Path, tmp_path: Path) -> None:
    caption = "\N{CJK UNIFIED IDEOGRAPH-5199} of a bird \N{LATIN SMALL LETTER U WITH DIAERESIS}"
    for image in images.glob("*.png"):
        image.with_suffix(".txt").write_text(caption, encoding="utf-8")
    run = tmp_path / "run"
    done = subprocess.run(
        command(tiny, images, run, "trainer.max_steps=2"),
        capture_output=True,
        timeout=120,
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, b"Traceback" in done.stderr, b"Logging error" in done.stderr) == (0, False, False)
    assert caption in (run / "artifact" / "README.md").read_text(encoding="utf-8")
    assert (run / "metrics.json").is_file()
    assert done.stdout.decode("ascii")


def test_characters_that_the_terminal_lacks_are_escaped() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdtune", "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n"],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith(rb"sdtune: gr\xfcn: unknown command")
