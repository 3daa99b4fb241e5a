"""Which launcher or sweeper a config names, by its class; imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra.core.utils import env_override
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig

from sdtune.errors import UserError


def plugin(node: DictConfig) -> type:
    """The class that a ``hydra.launcher`` or ``hydra.sweeper`` node names."""
    target = str(node._target_)
    try:
        found: type = get_class(target)
    except (HydraException, ImportError, ValueError) as error:
        raise UserError(f"{target} cannot be imported ({error})", key="hydra", remedy="install its package") from error
    return found


def is_joblib(kind: type) -> bool:
    """Whether ``kind`` is Hydra's launcher of jobs in joblib's worker processes."""
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        return False
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher

    return issubclass(kind, JoblibLauncher)


def is_slurm(kind: type) -> bool:
    """Whether ``kind`` is Hydra's launcher of jobs on SLURM."""
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        return False
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

    return issubclass(kind, SlurmLauncher)


@contextmanager
def shared_out_cores(n_jobs: int, hardware: Mapping[str, Any], jobs: int, kept: int | None = None) -> Iterator[bool]:
    """Divide the free cores among joblib's worker processes; yields False if there are none, and jobs run in this one.

    With ``n_jobs=-1`` there are as many processes as the free cores have room for, or one where the jobs would share a
    GPU. Each computes with its part of the cores: with more threads than cores, small operations wait until each thread
    is scheduled. loky and OpenMP read the numbers from environment variables.

    Args:
        n_jobs: of joblib's launcher.
        hardware: the config group.
        jobs: how many may run at once.
        kept: the threads of a job that goes on.
    """
    from joblib import effective_n_jobs

    from sdtune.hardware.devices import device
    from sdtune.hardware.threads import free_cores, given_threads

    free, threads = free_cores(), given_threads(hardware, kept)
    own: dict[str, str] = {}
    if n_jobs != -1:
        count = min(effective_n_jobs(n_jobs), jobs)
    elif device(str(hardware.get("accelerator", "auto"))).type == "cpu":
        count = min(max(1, free // (threads or 1)), jobs)
    else:
        print("joblib: the jobs share a GPU; hydra.launcher.n_jobs=N runs several at once")
        count = 1
    if n_jobs == -1:
        own["LOKY_MAX_CPU_COUNT"] = str(count)
    threads = threads or max(1, free // count)
    own["OMP_NUM_THREADS"] = str(threads)
    print(f"joblib: jobs at once: {count}; threads of each: {threads}")
    with env_override(own):
        yield effective_n_jobs(n_jobs) > 1
