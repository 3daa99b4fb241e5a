"""Progress bars, log lines where they are not shown, and log lines above them."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sdtune import progress
from sdtune.progress import Bar, LogHandler, bar, duration, phase, track


class Terminal(io.StringIO):
    """Stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@contextmanager
def on_terminal(columns: int = 80) -> Iterator[Terminal]:
    """Standard output and error on one terminal. Not a fixture, because pytest sets both again before the test."""
    stream = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdout", stream)
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("TERM", "xterm-256color")
        yield stream


class Clock:
    """Replaces ``time.monotonic``; advanced by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def plain(text: str) -> str:
    """Lines that were written to a terminal, also those that were replaced later, without colors."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


def test_title_is_not_read_as_markup() -> None:
    """As a class prompt with weights in brackets; rich would raise an error for a closing tag."""
    with on_terminal(200) as terminal, bar("Generating class images: a dog [/sitting] [red]", 2) as advance:
        advance(1)
    assert "a dog [/sitting] [red]" in plain(terminal.getvalue())


@pytest.mark.parametrize("setting", [{"TERM": "dumb"}, {"LOCAL_RANK": "1"}])
def test_no_bar_on_a_dumb_terminal_and_in_other_processes(
    setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_terminal() as terminal:
        for name, value in setting.items():
            monkeypatch.setenv(name, value)
        with bar("Encoding", 2) as advance:
            advance(1)
    assert terminal.getvalue() == ""


def test_no_control_characters_in_a_file_with_forced_colors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in CI."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bar("Encoding", 2) as advance:
        advance(1)
    assert capsys.readouterr().err == ""


def test_long_title_leaves_the_other_bars_their_place() -> None:
    with on_terminal() as terminal:
        outer = Bar("Training", 100)
        outer.update(30, "loss 0.1234  lr 1.0e-04")
        inner = Bar("Generating images of 'a photo of a very long class prompt' and 3 other prompts", 10)
        inner.update(1)
        inner.close()
        outer.close(keep=True)
    lines = [line for line in plain(terminal.getvalue()).splitlines() if line.startswith("Training")]
    assert all("/100" in line for line in lines)
    assert max(map(len, plain(terminal.getvalue()).splitlines())) <= 80


def test_log_lines_are_printed_above_the_bar() -> None:
    with on_terminal() as terminal, bar("Encoding", 4) as advance:
        advance(1)
        LogHandler(terminal).emit(logging.makeLogRecord({"msg": "a line [red] of the log :fire: 10:100:5"}))
        advance(1)
    lines = [line for line in plain(terminal.getvalue()).splitlines() if line.strip()]
    assert any(line.startswith("Encoding") for line in lines)
    assert "a line [red] of the log :fire: 10:100:5" in lines
    assert not [line for line in lines if "Encoding" in line and "a line" in line]


def test_log_line_longer_than_the_terminal_stays_one_line() -> None:
    """So that a command can be copied."""
    command = "sdtune sample " + "x" * 100
    with on_terminal() as terminal, bar("Encoding", 4):
        LogHandler(terminal).emit(logging.makeLogRecord({"msg": command}))
    assert command in plain(terminal.getvalue())


def test_log_line_on_another_stream_is_written_there() -> None:
    """As in ``sdtune train > log``, where only the bar is on the terminal."""
    file = io.StringIO()
    with on_terminal() as terminal, bar("Encoding", 4):
        LogHandler(file).emit(logging.makeLogRecord({"msg": "a line"}))
    assert file.getvalue() == "a line\n"
    assert "a line" not in terminal.getvalue()


def test_nested_bar_is_a_second_line_of_the_same_display() -> None:
    with on_terminal() as terminal:
        outer = Bar("Training", 10)
        outer.update(3, "loss 0.1")
        assert list(track("Sample images", [1, 2], 2)) == [1, 2]
        outer.close(keep=True)
    lines = [line for line in plain(terminal.getvalue()).splitlines() if line.strip()]
    assert any(line.startswith("Sample images") for line in lines)
    assert lines[-1].startswith("Training")
    assert progress._display.console is None


def test_bar_is_removed_after_an_error() -> None:
    with on_terminal() as terminal, pytest.raises(RuntimeError), bar("Encoding", 4):
        raise RuntimeError
    assert "Encoding" in terminal.getvalue()
    assert progress._display.console is None


@pytest.mark.parametrize("columns", [80, 150])
def test_training_bar_fits_the_terminal(columns: int) -> None:
    with on_terminal(columns) as terminal:
        shown = Bar("Training", 100_000, 99_000)
        shown.update(99_500, "loss 0.1234  lr 1.0e-04  val 0.1234")
        shown.close(keep=True)
    last = [line for line in plain(terminal.getvalue()).splitlines() if line.strip()][-1]
    assert len(last) <= columns
    assert "99,500/100,000 loss 0.1234  lr 1.0e-04  val 0.1234" in last


def test_without_a_terminal_lines_state_what_is_done_and_the_time_left(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two seconds, then once a minute; the items of a batch arrive together."""
    caplog.set_level(logging.INFO)
    clock = Clock(monkeypatch)
    with bar("Encoding images", 40) as advance:
        for _ in range(10):
            clock.now += 20
            for _ in range(4):
                advance(1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "Encoding images: 4 of 40, about 3 min left",
        "Encoding images: 16 of 40, about 2 min left",
        "Encoding images: 28 of 40, about 60 s left",
    ]
    assert capsys.readouterr().err == ""


def test_quick_phases_write_no_lines(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with bar("Encoding images", 40) as advance, phase("Loading"):
        advance(40)
    with bar("Nothing", 0) as advance:
        advance(1)
    assert not caplog.records
    assert capsys.readouterr().err == ""


def test_one_long_batch_has_a_line_at_its_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock(monkeypatch)
    with bar("Generating images", 4) as advance:
        clock.now += 300
        for _ in range(4):
            advance(1)
    assert [record.getMessage() for record in caplog.records] == ["Generating images: 4 in 5 min"]


def test_phase_states_its_time_without_a_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock(monkeypatch)
    with phase("Loading a model"):
        clock.now += 14
    assert [record.getMessage() for record in caplog.records] == ["Loading a model: 14 s"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5400, "1.5 h")])
def test_duration_is_rounded(seconds: float, text: str) -> None:
    assert duration(seconds) == text
