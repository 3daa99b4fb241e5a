"""Which launcher or sweeper a config names, by its class; imports no torch."""

from __future__ import annotations

import importlib.util

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
