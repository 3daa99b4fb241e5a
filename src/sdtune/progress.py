"""A progress bar for work before training; lines in a log file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("sdtune")


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances the bar by so many."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if total and not console.is_terminal:
        log.info("%s: %d", title, total)
    with Progress(*columns, console=console, transient=True, disable=not total) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, advance=done)
