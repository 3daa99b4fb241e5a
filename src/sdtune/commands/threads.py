"""The number of torch's CPU threads for a command, from ``hardware.threads``."""

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
from sdtune.hardware.threads import free_cores, given_threads, torch_threads, usable_cores
from sdtune.runs.layout import THREADS
from sdtune.runs.state import kept_threads

log = logging.getLogger("sdtune")


@contextmanager
def chosen_threads(hardware: Mapping[str, Any], kept: int | None = None) -> Iterator[int]:
    """Have torch use the CPU threads that ``hardware.threads`` asks for; yields their number.

    ``OMP_NUM_THREADS`` says the same meanwhile to the processes that Lightning starts. Without it, Lightning would
    choose another number for all of them, this one included.

    Args:
        kept: the number of an earlier start, which ``auto`` takes again.
    """
    count = given_threads(hardware, kept) or _measured_threads(hardware)
    with torch_threads(count), env_override({"OMP_NUM_THREADS": str(count)}):
        yield count


@contextmanager
def run_threads(hardware: Mapping[str, Any], folder: Path, resumed: bool) -> Iterator[int]:
    """:func:`chosen_threads` for the training in ``folder``, which keeps the number.

    A resumed training takes its own number again unless ``hardware.threads`` gives another.
    """
    with chosen_threads(hardware, kept_threads(folder) if resumed else None) as count:
        keep_threads(folder, count)
        yield count


def keep_threads(folder: Path, count: int) -> None:
    """Save ``count`` in ``folder``; warns if it was another number, since sums may differ in their last digits."""
    if not is_global_zero():
        return
    before = kept_threads(folder)
    if before not in (None, count):
        log.warning(
            "hardware.threads: %d now and %d before: what follows may differ in its last digits from a run that was"
            " never stopped",
            count,
            before,
        )
    write_json(folder / THREADS, {"threads": count})


def _measured_threads(hardware: Mapping[str, Any]) -> int:
    processes = local_processes(hardware)
    count = max(1, free_cores() // processes)
    if processes == 1 and count < usable_cores():
        log.info(
            "threads: %d of %d, since the other cores are busy; hardware.threads=N sets another number",
            count,
            usable_cores(),
        )
    return count
