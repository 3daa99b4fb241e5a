"""``sdtune train``: checks that an earlier start does not stand in the way, and runs the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig

from sdtune.callbacks.checkpoints import last_checkpoint
from sdtune.commands.checks import check_run
from sdtune.commands.threads import run_threads
from sdtune.commands.train_run import TrainRun
from sdtune.config import hardware
from sdtune.config.settings import plain
from sdtune.errors import UserError
from sdtune.hardware.processes import is_global_zero
from sdtune.quoting import shell_override
from sdtune.runs.compare import check_unchanged
from sdtune.shared_backbone.compatibility import alone


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check ``config`` and ``folder``, and give the function that runs it."""
    run = checked_run(config, folder)

    def start(composed: DictConfig) -> float | None:
        with run_threads(run.config["hardware"], folder, run.settings.resume is not None):
            return run.start()

    return start


def checked_run(config: DictConfig, folder: Path, shared: bool = False) -> TrainRun:
    """The run of ``config`` in ``folder``, checked.

    Args:
        shared: whether it shares its backbone with others, and so trains on one device.
    """
    container = plain(config)
    if container.get("resume"):
        _check_resumed(container, folder)
    elif is_global_zero() and ((folder / "metrics.csv").exists() or any(folder.glob("checkpoints/*"))):
        if not any(folder.glob("checkpoints/step*.ckpt")):
            raise UserError(
                f"{folder} holds a run that ended before its first checkpoint",
                key="hydra.run.dir",
                remedy="remove it, or name another folder",
            )
        again = shell_override("resume", folder)
        raise UserError(f"{folder} already holds a run; {again} goes on with it", key="hydra.run.dir")
    if shared or _will_share(container):
        hardware.check_hardware(container["hardware"])
        hardware.check_indices(container["hardware"])
        container["hardware"] = hardware.on_one(container["hardware"])
    return check_run(container, folder)


def _check_resumed(config: dict[str, Any], folder: Path) -> None:
    """UserError where the run in ``folder`` cannot go on, or is at its end."""
    checkpoint = last_checkpoint(folder)
    check_unchanged(config, folder)
    done, steps = int(checkpoint.stem.removeprefix("step")), config["trainer"]["max_steps"]
    if done > steps:
        raise UserError(
            f"{steps} lies before step {done}, which {folder} has reached",
            key="trainer.max_steps",
            remedy="give a larger one",
        )
    if (folder / "metrics.json").exists() and done >= steps:
        raise UserError(
            f"the run in {folder} is complete at step {done}",
            key="resume",
            remedy="give a larger trainer.max_steps= to extend it",
        )


def _will_share(config: dict[str, Any]) -> bool:
    """Whether a job that is checked before its sweep starts will go through a backbone with others."""
    if not HydraConfig.initialized():
        return False
    launcher = get_class(str(HydraConfig.get().launcher._target_))
    return getattr(launcher, "shares_backbone", False) and alone(config) is None
