"""Identify launcher and sweeper plugins by class, and divide CPU cores among joblib workers; imports no torch."""

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
    """Class of a ``hydra.launcher`` or ``hydra.sweeper`` node; UserError if it cannot be imported."""
    target = str(node._target_)
    try:
        plugin_class: type = get_class(target)
    except (HydraException, ImportError, ValueError) as error:
        raise UserError(f"{target} cannot be imported ({error})", key="hydra", remedy="install its package") from error
    return plugin_class


def is_joblib(kind: type) -> bool:
    """Whether ``kind`` is the launcher of Hydra's joblib plugin."""
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        return False
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher

    return issubclass(kind, JoblibLauncher)


def is_slurm(kind: type) -> bool:
    """Whether ``kind`` is the SLURM launcher of Hydra's submitit plugin."""
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        return False
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

    return issubclass(kind, SlurmLauncher)


@contextmanager
def divided_cores(n_jobs: int, hardware: Mapping[str, Any], jobs: int, kept: int | None = None) -> Iterator[bool]:
    """Context manager that divides the free cores among joblib's worker processes; yields whether there are workers.

    Without workers, the jobs run in this process. With ``n_jobs=-1`` the free cores determine the number of processes,
    which is 1 if the jobs would share a GPU. Each process uses its share of the cores as threads: with more threads
    than cores, small operations wait until each thread is scheduled. loky and OpenMP read the numbers from environment
    variables.

    Args:
        n_jobs: ``n_jobs`` of the joblib launcher.
        hardware: the ``hardware`` config group.
        jobs: maximum number of concurrent jobs.
        kept: number of threads of the jobs that are resumed, if any.
    """
    from joblib import effective_n_jobs

    from sdtune.hardware.devices import device
    from sdtune.hardware.threads import configured_threads, free_cores

    free, threads = free_cores(), configured_threads(hardware, kept)
    environment: dict[str, str] = {}
    if n_jobs != -1:
        count = min(effective_n_jobs(n_jobs), jobs)
    elif device(str(hardware.get("accelerator", "auto"))).type == "cpu":
        count = min(max(1, free // (threads or 1)), jobs)
    else:
        print(
            "joblib: one job at a time because the jobs share a GPU; set hydra.launcher.n_jobs=N to run N concurrently"
        )
        count = 1
    if n_jobs == -1:
        environment["LOKY_MAX_CPU_COUNT"] = str(count)
    threads = threads or max(1, free // count)
    environment["OMP_NUM_THREADS"] = str(threads)
    print(f"joblib: concurrent jobs: {count}; threads per job: {threads}")
    with env_override(environment):
        yield effective_n_jobs(n_jobs) > 1
