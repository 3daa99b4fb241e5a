"""Wait for the DDP processes that Lightning started."""

from __future__ import annotations

import logging
import subprocess

import pytorch_lightning as pl

log = logging.getLogger("sdtune")

_TIMEOUT = 60.0
"""Seconds to wait for a process to exit after its work is done."""


def wait_for_children(trainer: pl.Trainer) -> None:
    """Wait until all other processes of the run have exited; kill those that do not exit in time."""
    for rank, child in enumerate(getattr(trainer.strategy.launcher, "procs", ()), start=1):
        try:
            code = child.wait(_TIMEOUT)
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        if code:
            log.warning("WARNING: process %d ended with exit code %d, after the artifact was written", rank, code)
