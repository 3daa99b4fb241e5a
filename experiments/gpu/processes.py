"""Measurements in processes of their own: a crash or an error of the GPU ends one measurement, not the check.

The processes are forked from a server that has imported torch and Lightning, so that a measurement does not begin with
all the seconds of its imports. The server, and the process of the check itself, must not import diffusers or peft: they
import bitsandbytes, if it is installed, which creates a CUDA context; a context takes memory of the GPU, cannot be used
in a forked process, and ignores environment variables that are set after it. Therefore the function that a process
calls is given by its name.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = (
    *("pytorch_lightning", "transformers.models.clip.modeling_clip", "sdtune.cli.launch", "sdtune.data"),
    "experiments.gpu.clock",
)
"""Modules that the server imports; none of them creates a CUDA context."""

_SHOWN = 500
"""Characters of an error that a row contains."""

_ERROR = re.compile(r"[\w.]*(Error|Exception|NotFinite)\b.*|torch\.\w*OutOfMemory.*")


class MeasurementFailed(Exception):
    """A process of the check ended with an error or took too long; the text is its last error, in one line."""


@dataclass
class Measuring:
    """A process that measures.

    Args:
        log: file with its stdout and stderr.
        limit: seconds after which :meth:`wait` stops it.
    """

    process: BaseProcess
    log: Path
    limit: float
    _has_ended: bool = False

    def wait(self) -> None:
        """Wait for the end of the process.

        Raises:
            MeasurementFailed: it ended with an error, or took longer than ``limit``.
        """
        try:
            self.process.join(self.limit)
            is_late = self.process.is_alive()
        finally:
            self.stop()
        if is_late:
            raise MeasurementFailed(f"stopped after {self.limit:.0f} s; see {self.log.name}")
        if self.process.exitcode:
            output = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
            raise MeasurementFailed(reason(output, int(self.process.exitcode)))

    def stop(self) -> None:
        """End the process, if it still runs, and the processes that it has started."""
        if self._has_ended:
            return  # its number may belong to another process
        assert self.process.pid is not None
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError):  # it leads its own group, unless it is just starting
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self._has_ended = True


def start(
    target: str,
    *arguments: object,
    log: Path,
    limit: float,
    environment: Mapping[str, str] | None = None,
) -> Measuring:
    """Call a function with ``arguments`` in a new process.

    Args:
        target: ``MODULE:FUNCTION``; the module is imported in the process.
        environment: variables that are set in the process before it uses the GPU.
    """
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver") if has_server else multiprocessing.get_context("spawn")
    context.set_forkserver_preload(list(PRELOADED))
    log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_call, args=(target, arguments, log, dict(environment or {})))
    process.start()
    return Measuring(process, log, limit)


def _call(target: str, arguments: Sequence[object], log: Path, environment: Mapping[str, str]) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
    os.environ.update(environment)
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    pkgutil.resolve_name(target)(*arguments)


COMMAND = f"{__name__}:command"


def command(*words: str) -> None:
    """Run ``sdtune WORDS`` in this process."""
    from sdtune.cli.main import main

    sys.argv = ["sdtune", *words]
    main()


def reason(output: str, code: int) -> str:
    """The last error in the ``output`` of a process that ended with exit ``code``, in one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if _ERROR.fullmatch(line)), lines[-1] if lines else "no output")
    return f"exit code {code}: {last}"[:_SHOWN]
