"""``sdtune train``: check the config and the output folder, then run or resume the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig

from sdtune.callbacks.checkpoints import last_checkpoint
from sdtune.commands.checks import check_run
from sdtune.commands.threads import run_threads
from sdtune.commands.train_run import TrainRun
from sdtune.config import hardware
from sdtune.config.settings import TRAINING, plain
from sdtune.errors import UserError
from sdtune.hardware.processes import is_global_zero
from sdtune.quoting import shell_override
from sdtune.runs.compare import check_unchanged
from sdtune.runs.hydra_values import current_overrides
from sdtune.shared_backbone.compatibility import alone


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check ``config`` and ``folder``, and return the function that runs the training."""
    run = build_run(config, folder)

    def start(composed: DictConfig) -> float | None:
        with run_threads(run.config["hardware"], folder, run.settings.resume is not None):
            return run.start()

    return start


def build_run(config: DictConfig, folder: Path, shared: bool = False) -> TrainRun:
    """Build and check the run of ``config`` in ``folder``.

    Args:
        shared: whether the run shares its backbone with others, and therefore trains on one device.

    Raises:
        UserError: the config is invalid, ``folder`` contains a run that is not resumed, or the run cannot be resumed.
    """
    container = plain(config, TRAINING)
    checkpoint = None
    is_auto = container.get("resume") == "auto"  # without a checkpoint; with one, the folder has replaced it
    if is_auto:
        container["resume"] = None
    if container.get("resume"):
        checkpoint = _checked_checkpoint(container, folder)
    elif is_global_zero() and not is_auto and ((folder / "metrics.csv").exists() or any(folder.glob("checkpoints/*"))):
        raise UserError(
            f"{folder} already contains a run",
            key="hydra.run.dir",
            remedy=f"continue it with: sdtune train {shell_override('resume', folder)}",
        )
    hardware.check_hardware(container["hardware"])
    if shared or _will_share(container):
        container["hardware"] = hardware.single_device(container["hardware"])
    # The jobs of a sweep with several processes run in subprocesses without the variables of a launcher.
    if not (_is_sweep() and hardware.process_count(container["hardware"]) > 1):
        hardware.check_launcher(container["hardware"])
    run = check_run(container, folder, checkpoint, typed=current_overrides())
    if checkpoint is not None:
        _check_steps(run.config["trainer"], checkpoint, folder)
    return replace(run, in_sweep=_is_sweep())


def _checked_checkpoint(config: dict[str, Any], folder: Path) -> Path | None:
    """The checkpoint from which the run in ``folder`` continues; None if it has none and starts from its beginning.

    Raises:
        UserError: the run cannot be resumed.
    """
    check_unchanged(config, folder)
    return last_checkpoint(folder)


def _check_steps(trainer: Mapping[str, Any], checkpoint: Path, folder: Path) -> None:
    """Raise UserError if the run in ``folder``, whose last checkpoint is ``checkpoint``, has no steps left."""
    key = "trainer.max_steps" if trainer.get("epochs") is None else "trainer.epochs"
    done, steps = int(checkpoint.stem.removeprefix("step")), trainer["max_steps"]
    if done > steps:
        raise UserError(
            f"{steps} steps are less than step {done}, which the run in {folder} has reached",
            key=key,
            remedy="set a larger value",
        )
    if (folder / "metrics.json").exists() and done >= steps:
        raise UserError(
            f"the run in {folder} is complete at step {done}", key="resume", remedy=f"set a larger {key} to extend it"
        )


def _is_sweep() -> bool:
    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)


def _will_share(config: dict[str, Any]) -> bool:
    """Whether the launcher of the current sweep will train this job on a shared backbone."""
    if not _is_sweep():
        return False
    launcher = get_class(str(HydraConfig.get().launcher._target_))
    return getattr(launcher, "shares_backbone", False) and alone(config) is None
