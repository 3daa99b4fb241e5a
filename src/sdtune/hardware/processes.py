"""The rank of this process, from its environment; imports no torch."""

from __future__ import annotations

import os


def is_global_zero() -> bool:
    """Whether this process has global rank 0, under torchrun, SLURM or Lightning's launcher.

    torchrun sets ``RANK``. SLURM numbers its tasks over all nodes in ``SLURM_PROCID``. Lightning's launcher sets
    ``LOCAL_RANK`` for each process and does not change ``NODE_RANK``. Its processes inherit the ``SLURM_PROCID`` of a
    surrounding SLURM task. So without ``RANK`` all three must be 0.
    """
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))


def is_torchrun() -> bool:
    """Whether torchrun (or another program with torch's elastic agent) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_under_slurm() -> bool:
    """Whether Lightning takes this process for a task of SLURM: not in an interactive shell, not under torchrun."""
    is_interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and not is_interactive and not is_torchrun()


def launched_processes() -> int:
    """Number of processes that a launcher has started, by its environment variables; 1 if there is none."""
    counts = [os.environ.get("WORLD_SIZE", "1")]
    if is_under_slurm():
        counts.append(os.environ["SLURM_NTASKS"])
    return max(int(count) if count.isdecimal() else 1 for count in counts)


def is_launched_again() -> bool:
    """Whether Lightning started this process for another device, with the command line of the first process."""
    return "LOCAL_RANK" in os.environ and not is_torchrun()
