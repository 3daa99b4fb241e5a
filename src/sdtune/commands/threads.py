"""The number of torch's CPU threads for a command, from ``hardware.threads``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdtune.config.hardware import local_processes
from sdtune.files import write_json
from sdtune.hardware.processes import is_global_zero, is_launched_again
from sdtune.hardware.threads import auto_threads, torch_threads, usable_cores
from sdtune.runs.layout import THREADS

log = logging.getLogger("sdtune")


@contextmanager
def chosen_threads(hardware: Mapping[str, Any]) -> Iterator[int]:
    """Have torch use the CPU threads that ``hardware.threads`` asks for; yields their number."""
    asked = hardware.get("threads", "auto")
    with torch_threads(_auto(hardware) if asked == "auto" else int(asked)) as count:
        yield count


@contextmanager
def run_threads(hardware: Mapping[str, Any], folder: Path, resumed: bool) -> Iterator[int]:
    """:func:`chosen_threads` for the training in ``folder``, which keeps the number.

    A resumed training takes its own number again unless ``hardware.threads`` gives another.
    """
    kept = kept_threads(folder) if resumed else None
    if kept is not None and hardware.get("threads", "auto") == "auto":
        hardware = {**hardware, "threads": kept}
    with chosen_threads(hardware) as count:
        keep_threads(folder, count)
        yield count


def kept_threads(folder: Path) -> int | None:
    """The number of threads that the training in ``folder`` has used so far; None if it has not begun."""
    file = folder / THREADS
    return int(json.loads(file.read_text())["threads"]) if file.is_file() else None


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


def _auto(hardware: Mapping[str, Any]) -> int:
    processes = local_processes(hardware)
    count = auto_threads(processes)
    if processes > 1 and not is_launched_again():
        # The processes that Lightning starts would count this one's cores as busy.
        os.environ["OMP_NUM_THREADS"] = str(count)
    elif count < usable_cores() and "OMP_NUM_THREADS" not in os.environ:
        log.info(
            "threads: %d of %d, since the other cores are busy; hardware.threads=N takes another number",
            count,
            usable_cores(),
        )
    return count
