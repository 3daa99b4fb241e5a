"""Wait for the processes that Lightning starts for further devices."""

from __future__ import annotations

import logging
import subprocess

import pytorch_lightning as pl

log = logging.getLogger("sdtune")

_PATIENCE = 60.0
"""Seconds for a process that has nothing left to do but to end."""


def wait_for_children(trainer: pl.Trainer) -> None:
    """Return when no process of the run is left but this one, so that the run's exit is its end."""
    for rank, child in enumerate(getattr(trainer.strategy.launcher, "procs", ()), start=1):
        try:
            code = child.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        if code:
            log.warning("WARNING: process %d ended with exit code %d, after the artifact was written", rank, code)
