"""The rank of this process, from its environment; imports no torch."""

from __future__ import annotations

import os


def is_global_zero() -> bool:
    """Whether this process is the first of its run, as torchrun, SLURM and Lightning's own launcher number them.

    torchrun sets ``RANK``. SLURM numbers its tasks over all nodes. Lightning's launcher sets ``LOCAL_RANK`` for each
    process and leaves ``NODE_RANK`` as the user set it; a run that it starts within one SLURM task inherits that
    task's ``SLURM_PROCID``, so all three must be 0.
    """
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))


def is_torchrun() -> bool:
    """Whether torchrun (or another user of torch's elastic agent) has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_launched_again() -> bool:
    """Whether Lightning has started this process for a further device, with the first one's command line."""
    return "LOCAL_RANK" in os.environ and not is_torchrun()
