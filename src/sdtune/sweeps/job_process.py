"""A job of several devices in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sdtune.errors import PRUNED, Pruned, RunFailed, Stopped
from sdtune.hardware.signals import STOP_SIGNALS, handled
from sdtune.quoting import override

_ANOTHERS = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
)
"""What a start of several processes leaves in the environment; the next one must find its own, and Lightning would take
SLURM's count of tasks, which is the sweep's, for the job's.
"""

_HANDED_ON = (*STOP_SIGNALS, signal.SIGHUP)
_OWN = "sdtune: "
"""Begins the lines in which a command says how it ended."""

_KEPT_LINES = 500
"""Of a process's stderr: the traceback of a failure is at its end."""

_PATIENCE = 10.0
"""Seconds for the last words of a process that has ended."""


def run_apart(command: str, options: Sequence[str], overrides: Sequence[str], folder: Path, resume: bool) -> None:
    """Run the job of ``overrides`` in ``folder``, or resume it there; ``options`` stand before them.

    Raises:
        Stopped: it was asked to stop, and has saved.
        Pruned: it fell behind the others of a search.
        RunFailed: it ended with another code than 0; the message is its own last word.
    """
    # All others are the run's own, which it repeats.
    threads = [given for given in overrides if given.startswith("hardware.threads=")]
    own = [override("resume", folder), *threads] if resume else [*overrides, override("hydra.run.dir", folder)]
    child = _start([command, *options, *own])
    asked: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        # A terminal that goes away asks for the same as a scheduler, and the job knows that.
        asked.append(signal.SIGTERM if number == signal.SIGHUP else number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, asked[-1])

    lines: deque[str] = deque(maxlen=_KEPT_LINES + 1)
    with handled(_HANDED_ON, hand_on):
        reader = threading.Thread(target=_repeat, args=(child, lines), daemon=True)
        reader.start()
        try:
            # Not the end of its words: the other processes of a job whose first one has died hold them open.
            code = child.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    reader.join(_PATIENCE)
    if len(lines) > _KEPT_LINES:
        lines[0] = "(earlier lines are left out)\n"
    _raise_for(code, asked, list(lines))


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """``sdtune`` in a session of its own: a signal reaches it once, from here, however it came."""
    environment = {
        key: value for key, value in os.environ.items() if key not in _ANOTHERS and not key.startswith("SLURM_")
    }
    return subprocess.Popen(
        [sys.executable, "-m", "sdtune", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )


def _raise_for(code: int, asked: Sequence[int], lines: Sequence[str]) -> None:
    """Raise what a process ended by whose exit code is ``code``; nothing for 0.

    Args:
        asked: the signals that it was sent.
        lines: the last of its stderr.
    """
    words = [line.removeprefix(_OWN).strip() for line in lines if line.startswith(_OWN)]
    said = words[-1] if words else ""
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Stopped(said, code)
    if asked and code:
        # It was too early, or too late, for the job to answer with a code of its own.
        raise Stopped(said or "stopped", 128 + asked[0])
    if code == PRUNED:
        raise Pruned(int(said.rpartition(" ")[2]))
    if code:
        text = "".join(lines)
        details = text if "Traceback (most recent call last)" in text or not said else None
        raise RunFailed(said or f"its process ended with exit code {code}", details=details)


def end_with_parent() -> None:
    """In the new process: be asked to stop, and save, when the sweep is killed (prctl's PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _repeat(child: subprocess.Popen[str], lines: deque[str]) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        sys.stderr.write(line)
        lines.append(line)
