"""Run a job on several devices in a subprocess: start it, forward signals to it, translate its exit code."""

from __future__ import annotations

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
from sdtune.hardware.sessions import kill_session, signal_session
from sdtune.hardware.signals import STOP_SIGNALS, handled
from sdtune.quoting import override

_LAUNCH_VARIABLES = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
)
"""Environment variables of a multi-process launch. They are removed for the subprocess, which must set its own. SLURM's
variables are removed as well: Lightning would use the sweep's number of tasks for the job.
"""

_REPORT_PREFIX = "sdtune: "
"""Start of the stderr lines in which a command reports how it ended."""

_STORED_LINES = 500
"""Number of stderr lines that are stored; the traceback of a failure is at the end."""

_STDERR_TIMEOUT = 10.0
"""Seconds to wait for the remaining stderr of a process that has ended."""


def run_subprocess(command: str, options: Sequence[str], overrides: Sequence[str], folder: Path, resume: bool) -> None:
    """Run the job with ``overrides`` in ``folder``, or resume it; ``options`` precede them on the command line.

    Raises:
        Stopped: a signal stopped the job.
        Pruned: the search pruned the job.
        RunFailed: any other exit code than 0; the message is the last line in which the job reports its error.
    """
    # A resumed run reads all other overrides from its folder.
    threads = [item for item in overrides if item.startswith("hardware.threads=")]
    job_overrides = (
        [override("resume", folder), *threads] if resume else [*overrides, override("hydra.run.dir", folder)]
    )
    child = _start([command, *options, *job_overrides])
    sent: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        sent.append(number)
        signal_session(child.pid, sent[-1])

    lines: deque[str] = deque(maxlen=_STORED_LINES + 1)
    with handled(STOP_SIGNALS, forward):
        reader = threading.Thread(target=_copy_stderr, args=(child, lines), daemon=True)
        reader.start()
        try:
            # Wait for the process, not for the end of stderr: if rank 0 dies, the other ranks keep the pipe open.
            code = child.wait()
        finally:
            kill_session(child.pid)
    reader.join(_STDERR_TIMEOUT)
    if len(lines) > _STORED_LINES:
        lines[0] = "(earlier lines are omitted)\n"
    _raise_for(code, sent, list(lines))


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start ``sdtune`` in a new session, so that signals reach it only from this process and only once."""
    environment = {
        key: value for key, value in os.environ.items() if key not in _LAUNCH_VARIABLES and not key.startswith("SLURM_")
    }
    return subprocess.Popen(
        [sys.executable, "-m", "sdtune", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        preexec_fn=terminate_with_parent if sys.platform == "linux" else None,
    )


def _raise_for(code: int, sent: Sequence[int], lines: Sequence[str]) -> None:
    """Raise the exception for the exit code ``code`` of a job; return if it is 0.

    Args:
        sent: signals that were sent to the process.
        lines: last lines of its stderr.
    """
    reports = [line.removeprefix(_REPORT_PREFIX).strip() for line in lines if line.startswith(_REPORT_PREFIX)]
    report = reports[-1] if reports else ""
    if code in (128 + number for number in STOP_SIGNALS):
        raise Stopped(report, code)
    if sent and code:
        # The signal arrived before the job handled signals, or after it stopped handling them.
        raise Stopped(report or "stopped", 128 + sent[0])
    if code == PRUNED:
        raise Pruned(int(report.rpartition(" ")[2]))
    if code:
        text = "".join(lines)
        details = text if "Traceback (most recent call last)" in text or not report else None
        raise RunFailed(report or f"its process ended with exit code {code}", details=details)


def terminate_with_parent() -> None:
    """In a child process: receive SIGTERM, and so save and stop, when the parent dies (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _copy_stderr(child: subprocess.Popen[str], lines: deque[str]) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        sys.stderr.write(line)
        lines.append(line)
