"""A job of several devices: a process of its own, with its own overrides frozen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sdtune.errors import RunFailed, Stopped

_ANOTHERS = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
)
"""What a start of several processes leaves in the environment; the next one must find its own."""


def run_apart(command: str, options: Sequence[str], overrides: Sequence[str], folder: Path, resume: bool) -> None:
    """Run the job of ``overrides`` in ``folder``, or resume it there; ``options`` stand before them.

    Raises:
        Stopped: it was asked to stop, and has saved.
        RunFailed: it ended with another code than 0; the message is its own last word.
    """
    place = str(folder).replace("'", "\\'")
    own = [f"resume={folder}"] if resume else [*overrides, f"hydra.run.dir='{place}'"]
    environment = {key: value for key, value in os.environ.items() if key not in _ANOTHERS}
    # A session of its own: a signal reaches it once, from here, however it came.
    child = subprocess.Popen(
        [sys.executable, "-m", f"sdtune.{command}", *options, *own],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def hand_on(number: int, frame: FrameType | None) -> None:
        os.killpg(child.pid, number)

    handlers = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    said = ""
    try:
        assert child.stderr is not None
        for line in child.stderr:
            sys.stderr.write(line)
            said = line.removeprefix("sdtune: ").strip() if line.startswith("sdtune: ") else said
        code = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Stopped(said, code)
    if code:
        raise RunFailed(said or f"its process ended with exit code {code}")
