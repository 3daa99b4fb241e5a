"""State of a run, read from its folder; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdtune.files import read_json
from sdtune.runs.layout import THREADS

STATE = "job.json"
"""In a job's folder: its overrides, its ``state`` (done, failed, pruned or unfinished) and the error."""

ERROR_LOG = "error.log"
"""In a failed job's folder: the traceback."""

UNFINISHED = "unfinished"


def finished(folder: Path) -> bool:
    """Whether the run in ``folder`` is complete."""
    return (folder / "metrics.json").is_file()


def ended(folder: Path) -> dict[str, Any]:
    """Content of ``job.json`` in ``folder``; the state is done if the run was completed later, as a single run."""
    state = read_json(folder / STATE)
    if finished(folder):
        state = {key: value for key, value in state.items() if key not in ("error", "traceback")} | {"state": "done"}
    return state


def saved_threads(folder: Path) -> int | None:
    """Number of CPU threads of the training in ``folder``; None if it has not started."""
    file = folder / THREADS
    return int(read_json(file)["threads"]) if file.is_file() else None
