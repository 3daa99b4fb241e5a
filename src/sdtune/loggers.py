"""Lightning loggers with conventions of sdtune: W&B, TensorBoard."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtune.errors import UserError


def wandb_logger(
    save_dir: str,
    method: str,
    label: str,
    sweep: str | None,
    project: str = "sdtune",
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    offline: bool = False,
    log_artifact: bool = False,
) -> Any:
    """Lightning's W&B logger, its metrics on axes of their own so that none is dropped for coming late.

    A resumed run goes on under its id, which its folder keeps.

    Args:
        save_dir: the run's folder.
        method: the run's job type.
        label, sweep: the run's name and group where ``name`` and ``group`` are None: what sets it apart from the others
            of its sweep, and the sweep's folder's name.
        offline: keep everything on disk for ``wandb sync``; needs no account.
        log_artifact: upload the run's artifact as a version of a W&B artifact that has the run's file's name.
    """
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    require_account(offline)
    folder = Path(save_dir)
    # Lightning's own offline=True sets WANDB_MODE for the whole process, and with it for the next job of a sweep.
    logger = WandbLogger(
        project=project,
        name=name or label,
        group=group or sweep,
        job_type=method,
        tags=list(tags),
        save_dir=save_dir,
        id=_run_id(folder),
        # Several runs of one process may be open at once.
        settings=wandb.Settings(reinit="create_new", **({"mode": "offline"} if offline else {})),
    )
    logger.experiment.define_metric("trainer/global_step")
    logger.experiment.define_metric("*", step_metric="trainer/global_step")
    logger.experiment.define_metric("validation_loss", step_metric="trainer/global_step", summary="min")
    logger.keeps_artifact = log_artifact  # type: ignore[attr-defined]
    return logger


def require_account(offline: bool) -> None:
    """UserError where W&B would ask for one."""
    account = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or (Path.home() / ".netrc").exists()
    if not offline and not account:
        raise UserError(
            "no account (WANDB_API_KEY is not set)",
            key="logger.wandb",
            remedy="log in, or give logger.wandb.offline=true",
        )


def _run_id(run: Path) -> str | None:
    if "WANDB_SWEEP_ID" in os.environ:
        return None  # W&B's agent has named the run
    file = run / "wandb" / "id"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_name(f"id.{secrets.token_hex(4)}")
        own.write_text(secrets.token_hex(4))
        with contextlib.suppress(FileExistsError):
            file.hardlink_to(own)  # torchrun's processes all come by here: the first one's counts
        own.unlink()
    return file.read_text()


def keep_artifact(loggers: Sequence[Any], artifact: Path, name: str) -> None:
    """Upload ``artifact`` where a logger was asked to."""
    for logger in loggers:
        if getattr(logger, "keeps_artifact", False):
            import wandb

            version = wandb.Artifact(re.sub(r"[^\w.-]+", "-", name), type="model")
            version.add_dir(str(artifact))
            logger.experiment.log_artifact(version)


def tensorboard_logger(save_dir: str) -> Any:
    """Lightning's TensorBoard logger, writing to ``<save_dir>/tensorboard``; needs the extra of that name."""
    from pytorch_lightning.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(save_dir, name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise UserError(
            "not installed", key="logger.tensorboard", remedy="pip install 'sdtune[tensorboard]'"
        ) from error


def close(loggers: list[Any], failed: bool) -> None:
    """Without this the next job of a sweep would write into this one's run."""
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if type(logger).__name__ == "WandbLogger":
            logger.experiment.finish(exit_code=1 if failed else 0)
