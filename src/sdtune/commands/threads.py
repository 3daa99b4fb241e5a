"""Number of CPU threads of torch during a command, set by ``hardware.threads``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import env_override

from sdtune.config.hardware import local_processes
from sdtune.files import write_json
from sdtune.hardware.processes import is_global_zero
from sdtune.hardware.threads import configured_threads, free_cores, torch_threads, usable_cores
from sdtune.runs.layout import THREADS
from sdtune.runs.state import saved_threads

log = logging.getLogger("sdtune")


@contextmanager
def choose_threads(hardware: Mapping[str, Any], kept: int | None = None) -> Iterator[int]:
    """Context manager that sets torch's number of CPU threads from ``hardware.threads``; yields the number.

    ``OMP_NUM_THREADS`` is set to the same number for the processes that Lightning starts. Without it, Lightning would
    choose another number for all processes, including this one.

    Args:
        kept: number of threads of an earlier start, which ``auto`` uses again.
    """
    count = configured_threads(hardware, kept) or _measured_threads(hardware)
    with torch_threads(count), env_override({"OMP_NUM_THREADS": str(count)}):
        yield count


@contextmanager
def run_threads(hardware: Mapping[str, Any], folder: Path, resumed: bool) -> Iterator[int]:
    """:func:`choose_threads` for the training in ``folder``; saves the number there.

    A resumed training uses its saved number again unless ``hardware.threads`` sets another.
    """
    with choose_threads(hardware, saved_threads(folder) if resumed else None) as count:
        save_threads(folder, count)
        yield count


def save_threads(folder: Path, count: int) -> None:
    """Save ``count`` in ``folder``; warn if another number was saved, since sums may differ in their last digits."""
    if not is_global_zero():
        return
    previous_count = saved_threads(folder)
    if previous_count not in (None, count):
        log.warning(
            "hardware.threads: %d, previously %d; the following metrics may differ in their last digits from those of"
            " an uninterrupted run",
            count,
            previous_count,
        )
    write_json(folder / THREADS, {"threads": count})


def _measured_threads(hardware: Mapping[str, Any]) -> int:
    processes = local_processes(hardware)
    count = max(1, free_cores() // processes)
    if processes == 1 and count < usable_cores():
        log.info(
            "threads: %d for %d cores, because the other cores are busy; set hardware.threads=N to change it",
            count,
            usable_cores(),
        )
    return count
