"""Loggers with the run's own conventions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def wandb_logger(
    save_dir: str,
    project: str = "sdtune",
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    offline: bool = False,
) -> Any:
    """Lightning's W&B logger, its figures on axes of their own so that none is dropped for coming late.

    Args:
        save_dir: the run's folder.
        offline: keep everything on disk for ``wandb sync``; needs no account.
    """
    from pytorch_lightning.loggers import WandbLogger

    account = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or (Path.home() / ".netrc").exists()
    if not offline and not account:
        raise ValueError(
            "logger.wandb: no account (WANDB_API_KEY is not set); log in, or give logger.wandb.offline=true"
        )
    # Lightning's own offline=True sets WANDB_MODE for the whole process, and with it for the next job of a sweep.
    logger = WandbLogger(
        project=project, name=name, group=group, tags=list(tags), save_dir=save_dir, settings=_settings(offline)
    )
    logger.experiment.define_metric("trainer/global_step")
    logger.experiment.define_metric("*", step_metric="trainer/global_step")
    return logger


def _settings(offline: bool) -> Any:
    import wandb

    return wandb.Settings(mode="offline") if offline else wandb.Settings()


def tensorboard_logger(save_dir: str) -> Any:
    """Lightning's TensorBoard logger, writing to ``<save_dir>/tensorboard``; needs the extra of that name."""
    from pytorch_lightning.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(save_dir, name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise ValueError("logger.tensorboard: not installed; pip install 'sdtune[tensorboard]'") from error


def close(loggers: list[Any], failed: bool) -> None:
    """Without this the next job of a sweep would write into this one's run."""
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if type(logger).__name__ == "WandbLogger":
            import wandb

            wandb.finish(exit_code=1 if failed else 0)
