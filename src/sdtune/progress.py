"""Progress bar for the work before training; a log line if stderr is not a terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("sdtune")


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Context manager that shows a progress bar and yields a function that advances it by a number of items."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if total and not console.is_terminal:
        log.info("%s: %d", title, total)
    with Progress(*columns, console=console, transient=True, disable=not total) as progress:
        task = progress.add_task(title, total=total)
        yield lambda items: progress.update(task, advance=items)
