"""Whether this process is the first of a run's processes; imports no torch."""

from __future__ import annotations

import os


def is_global_zero() -> bool:
    """Whether this process speaks for the run, of those that a launcher has started for it."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
