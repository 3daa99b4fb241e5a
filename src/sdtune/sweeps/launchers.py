"""Which launcher or sweeper a config names, by its class; imports no torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

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
def shared_out_cores(launcher: DictConfig, accelerator: str, jobs: int) -> Iterator[None]:
    """Divide the free cores among joblib's processes, through environment variables that loky and OpenMP read.

    With ``n_jobs=-1`` there are as many processes as free cores, or one where the jobs would share a GPU. Each computes
    with its part of the cores: with more threads than cores, small operations wait until each thread is scheduled.

    Args:
        launcher: the node of joblib's launcher.
        accelerator: ``hardware.accelerator``.
        jobs: how many may run at once.
    """
    from sdtune.hardware.devices import device
    from sdtune.hardware.threads import free_cores

    free, asked = free_cores(), int(launcher.n_jobs)
    own: dict[str, str] = {}
    if asked == -1 and device(accelerator).type == "cpu":
        asked = min(free, jobs)
        own["LOKY_MAX_CPU_COUNT"] = str(asked)
    elif asked == -1:
        print("joblib: one job at once, since the jobs share a GPU; hydra.launcher.n_jobs=N runs more")
        asked = 1
        own["LOKY_MAX_CPU_COUNT"] = "1"
    if asked > 0 and "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = str(max(1, free // min(asked, jobs)))
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
