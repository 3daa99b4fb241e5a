"""Progress bars on stderr; log lines where stderr is neither a terminal nor a notebook.

All bars of a process share one live display, so that a bar inside another one (sample images during training), and bars
of several threads, are lines of the same display.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

log = logging.getLogger("sdtune")

_Item = TypeVar("_Item")

_FIRST_LINE, _NEXT_LINES = 2.0, 60.0
"""Seconds until the first log line of a phase, and between the following ones, without a live display."""
_SAME_BATCH = 0.05
"""Seconds between items that belong to one batch."""


def is_shown() -> bool:
    """Whether bars are shown: stderr is a terminal, or the process is the kernel of a notebook with ipywidgets."""
    if not _is_first_process():
        return False
    console = Console(stderr=True)
    if console.is_jupyter:
        return find_spec("ipywidgets") is not None
    # Not is_terminal, which is true for a file where FORCE_COLOR is set.
    return sys.stderr.isatty() and not console.is_dumb_terminal


def _is_first_process() -> bool:
    """Whether this is the process that shows progress, of those that torchrun, Lightning or a sweep has started."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK")
    return multiprocessing.parent_process() is None and all(os.environ.get(name, "0") == "0" for name in names)


class _Display:
    """The live display of the process; it is on the screen while it has a bar."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._bars = 0

    @property
    def console(self) -> Console | None:
        """Console of the display, which prints above the bars; None if there is no bar."""
        progress = self._progress
        return None if progress is None else progress.console

    def add(self, title: str, total: int | None, completed: int = 0) -> tuple[Progress, TaskID]:
        """Add a bar; without ``total``, it moves back and forth."""
        with self._lock:
            if self._progress is None:
                self._progress = _new_progress()
                self._progress.live.transient = True
                self._progress.start()
            self._bars += 1
            return self._progress, self._progress.add_task(title, total=total, completed=completed, metrics="")

    def remove(self, progress: Progress, task: TaskID, *, keep: bool) -> None:
        """Remove a bar from the display; with ``keep``, its last state stays on the screen."""
        with self._lock:
            self._bars -= 1
            if keep:
                progress.live.transient = False
            else:
                progress.remove_task(task)
            if self._bars == 0:
                progress.stop()
                self._progress = None


_display = _Display()


class _Count(ProgressColumn):
    """``12/500``; empty for a phase of unknown length."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:,.0f}/{task.total:,.0f}", style="progress.download")


class _TimeLeft(ProgressColumn):
    """``6 min left``; empty while it is unknown, and at the end."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("" if not left else f"{duration(left)} left", style="progress.remaining")


def _new_progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=_title_width())),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        _Count(Column(no_wrap=True)),
        TextColumn("{task.fields[metrics]}", markup=False),
        TimeElapsedColumn(),
        _TimeLeft(Column(no_wrap=True)),
        console=Console(stderr=True, emoji=False),
        expand=True,
        refresh_per_second=4,
        speed_estimate_period=3600,  # steps may take minutes
    )


def _title_width() -> int:
    """Maximum number of columns of a title; the bar needs the rest of the line."""
    return max(Console(stderr=True).width // 3, 20)


class Bar:
    """A progress bar from its creation until :meth:`close`; log lines if bars are not shown (:func:`is_shown`).

    Args:
        title: what is done; shown as it is, without markup.
        total: number of items.
        completed: number of items that are done at the start.
    """

    def __init__(self, title: str, total: int, completed: int = 0) -> None:
        self._title, self._total, self._done, self._first = title, total, completed, completed
        self._start = self._last = time.monotonic()
        self._next_line, self._has_line = _FIRST_LINE, False
        self._shown = _display.add(title, total, completed) if is_shown() else None

    @property
    def is_shown(self) -> bool:
        """Whether the bar is on the screen."""
        return self._shown is not None

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return 80 if self._shown is None else self._shown[0].console.width

    def update(self, completed: int, metrics: str = "") -> None:
        """Set the number of items that are done, and the text beside the bar."""
        self._done = completed
        if self._shown is not None:
            progress, task = self._shown
            progress.update(task, completed=completed, metrics=metrics)

    def advance(self, items: int = 1) -> None:
        """Add ``items`` to the number of items that are done; write a log line if one is due.

        The line is about the previous batch, whose items were reported together.
        """
        now, elapsed = time.monotonic(), self._last - self._start
        if self._shown is None and elapsed >= self._next_line and now - self._last > _SAME_BATCH:
            self._next_line = elapsed + _NEXT_LINES
            self._has_line = True
            left = elapsed / (self._done - self._first) * (self._total - self._done)
            _line(f"{self._title}: {self._done:,} of {self._total:,}, about {duration(left)} left")
        self.update(self._done + items)
        self._last = now

    def close(self, *, keep: bool = False) -> None:
        """Remove the bar from the screen; with ``keep``, its last state stays.

        Without a screen, a phase of two seconds or more that has no line yet gets one.
        """
        elapsed = time.monotonic() - self._start
        if self._shown is not None:
            _display.remove(*self._shown, keep=keep)
            self._shown = None
        elif elapsed >= _FIRST_LINE and not self._has_line and not keep:
            _line(f"{self._title}: {self._done:,} in {duration(elapsed)}")


def duration(seconds: float) -> str:
    """``seconds`` rounded for a person, such as ``40 s``, ``6 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _line(text: str) -> None:
    """Log ``text``; before logging is set up, print it to stderr. Only in the first process."""
    if not _is_first_process():
        return
    if logging.getLogger().hasHandlers() and log.isEnabledFor(logging.INFO):
        log.info("%s", text)
    else:
        print(text, file=sys.stderr)


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Context manager that shows a :class:`Bar` and yields a function that advances it by a number of items."""
    if not total:
        yield lambda items: None
        return
    shown = Bar(title, total)
    try:
        yield shown.advance
    finally:
        shown.close()


def track(title: str, items: Iterable[_Item], total: int) -> Iterator[_Item]:
    """Yield ``items`` while a bar shows how many are done."""
    with bar(title, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Context manager for work of unknown length: a moving bar, or afterwards a log line if it took two seconds."""
    start = time.monotonic()
    shown = _display.add(title, None) if is_shown() else None
    try:
        yield
    finally:
        if shown is not None:
            _display.remove(*shown, keep=False)
    elapsed = time.monotonic() - start
    if shown is None and elapsed >= _FIRST_LINE:
        _line(f"{title}: {duration(elapsed)}")


NOT_ON_CONSOLE = "not_on_console"
"""Attribute of a log record that only the log file gets."""


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Handler for log lines on stdout that prints above the progress bars, if both are on the same terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, NOT_ON_CONSOLE, False):
            return
        console = _display.console
        if console is None or not self.stream.isatty():
            super().emit(record)
        else:
            console.print(Text(self.format(record)), soft_wrap=True)
