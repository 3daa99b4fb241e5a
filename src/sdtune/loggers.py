"""Lightning loggers (W&B, TensorBoard) configured for runs and sweeps of sdtune."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtune.errors import UserError

log = logging.getLogger("sdtune")


class LoggerSettings(ABC):
    """Base class of logger settings; nothing is written and no service is contacted before :meth:`open`."""

    def check(self) -> None:  # noqa: B027
        """Raise UserError if a requirement of :meth:`open` is missing."""

    @abstractmethod
    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> Any:
        """Create the Lightning logger.

        Args:
            folder: the run folder.
            method: class name of the method.
            label: the overrides in which the run differs from the other runs of its sweep, or the name of its folder.
            sweep: name of the sweep's folder; None outside of a sweep.
        """

    def keep_artifact(self, logger: Any, artifact: Path, name: str) -> None:  # noqa: B027
        """Upload the folder ``artifact`` of a complete run under ``name``, if the settings enable it."""

    def close(self, logger: Any, failed: bool) -> None:
        """End the logger's run; otherwise the next job of a sweep would write into it."""
        logger.finalize("failed" if failed else "success")


@dataclass(frozen=True)
class OtherLogger(LoggerSettings):
    """Logger of another package, created when the run starts."""

    make: Callable[[dict[str, Any]], Any]
    """Factory; it is called with optional keyword arguments: ``save_dir``."""

    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> Any:
        return self.make({"save_dir": str(folder)})


@dataclass(frozen=True)
class Wandb(LoggerSettings):
    """Lightning's W&B logger.

    Metrics use ``trainer/global_step`` as x-axis, so that W&B does not drop values that are logged out of order. A
    resumed run continues the same W&B run; its id is stored in the run folder. The job type is the method.

    Args:
        name: name of the W&B run; null: the overrides in which it differs from the other jobs of its sweep.
        group: group of the W&B run; null: the name of the sweep's folder.
        offline: write to disk only, for ``wandb sync``; needs no account.
        log_artifact: upload the run's artifact as a version of a W&B artifact, named like the artifact's file.
    """

    project: str = "sdtune"
    name: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    offline: bool = False
    log_artifact: bool = False

    def check(self) -> None:
        account = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or (Path.home() / ".netrc").exists()
        if not self.offline and not account:
            raise UserError(
                "no account (WANDB_API_KEY is not set)",
                key="logger.wandb",
                remedy="log in, or set logger.wandb.offline=true",
            )

    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> Any:
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        self.check()
        # Not Lightning's offline=True: it sets WANDB_MODE for the process, hence also for the next job of a sweep.
        logger = WandbLogger(
            project=self.project,
            name=self.name or label,
            group=self.group or sweep,
            job_type=method,
            tags=list(self.tags),
            save_dir=str(folder),
            id=wandb_run_id(folder),
            # One process may have several open runs.
            settings=wandb.Settings(reinit="create_new", silent=True, **({"mode": "offline"} if self.offline else {})),
        )
        run = logger.experiment
        if isinstance(run, wandb.Run):  # the other processes have none
            log.info("W&B: %s", f"offline; wandb sync {Path(run.dir).parent} uploads it" if run.offline else run.url)
        logger.experiment.define_metric("trainer/global_step")
        logger.experiment.define_metric("*", step_metric="trainer/global_step")
        logger.experiment.define_metric("validation_loss", step_metric="trainer/global_step", summary="min")
        return logger

    def keep_artifact(self, logger: Any, artifact: Path, name: str) -> None:
        if self.log_artifact:
            import wandb

            version = wandb.Artifact(re.sub(r"[^\w.-]+", "-", name), type="model")
            version.add_dir(str(artifact))
            logger.experiment.log_artifact(version)

    def close(self, logger: Any, failed: bool) -> None:
        super().close(logger, failed)
        logger.experiment.finish(exit_code=1 if failed else 0)


def wandb_run_id(run: Path) -> str | None:
    """Id of the W&B run of the folder ``run``, the same in all processes; None if a W&B sweep agent sets it."""
    if "WANDB_SWEEP_ID" in os.environ:
        return None
    file = run / "wandb" / "id"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"id.{secrets.token_hex(4)}")
        temporary.write_text(secrets.token_hex(4), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            file.hardlink_to(temporary)  # only the first process sets the id
        temporary.unlink()
    return file.read_text(encoding="utf-8")


@dataclass(frozen=True)
class TensorBoard(LoggerSettings):
    """Lightning's TensorBoard logger, writing to ``<run>/tensorboard``; needs the extra ``tensorboard``."""

    def check(self) -> None:
        if not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
            raise UserError(
                "TensorBoard is not installed", key="logger.tensorboard", remedy="pip install 'sdtune[tensorboard]'"
            )

    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> Any:
        from pytorch_lightning.loggers import TensorBoardLogger

        self.check()
        return TensorBoardLogger(str(folder), name="", version="tensorboard")
