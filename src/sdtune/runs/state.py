"""How a run ended, read from its folder; imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdtune.runs.layout import THREADS

STATE = "job.json"
"""Of a job's folder: its overrides, its ``state`` (done, failed, pruned, or unfinished), and why."""

ERROR_LOG = "error.log"
"""Of a failed job's folder: the traceback."""

UNFINISHED = "unfinished"


def finished(folder: Path) -> bool:
    """Whether the run in ``folder`` is complete."""
    return (folder / "metrics.json").is_file()


def ended(folder: Path) -> dict[str, Any]:
    """What ``folder`` says of its job; a run that was completed by itself since is done."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    if finished(folder):
        state = {key: value for key, value in state.items() if key not in ("error", "traceback")} | {"state": "done"}
    return state


def kept_threads(folder: Path) -> int | None:
    """The number of CPU threads that the training in ``folder`` has used so far; None if it has not begun."""
    file = folder / THREADS
    return int(json.loads(file.read_text())["threads"]) if file.is_file() else None
