"""Lightning loggers with conventions of sdtune: W&B, TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtune.errors import UserError


class LoggerSettings(ABC):
    """Settings of a logger; nothing is written and no service is asked before :meth:`open`."""

    def check(self) -> None:  # noqa: B027
        """UserError for what :meth:`open` would miss."""

    @abstractmethod
    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> Any:
        """Lightning's logger.

        Args:
            folder: the run's.
            method: the class of what is trained.
            label, sweep: what sets the run apart from the others of its sweep, and the name of the sweep's folder.
        """

    def keep_artifact(self, logger: Any, artifact: Path, name: str) -> None:  # noqa: B027
        """Upload the folder ``artifact`` of a complete run under ``name``, where that is asked for."""

    def close(self, logger: Any, failed: bool) -> None:
        """End the logger's run: the next job of a sweep would write into it."""
        logger.finalize("failed" if failed else "success")


@dataclass(frozen=True)
class OtherLogger(LoggerSettings):
    """A logger of another package, built when the run begins."""

    make: Callable[[dict[str, Any]], Any]
    """Builds it from arguments that it may take: ``save_dir``."""

    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> Any:
        return self.make({"save_dir": str(folder)})


@dataclass(frozen=True)
class Wandb(LoggerSettings):
    """Lightning's W&B logger, its metrics on axes of their own so that none is dropped for coming late.

    A resumed run goes on under its id, which its folder keeps. The method is the W&B run's job type.

    Args:
        name, group: of the W&B run; the label and the sweep if None.
        offline: keep everything on disk for ``wandb sync``; needs no account.
        log_artifact: upload the run's artifact as a version of a W&B artifact that has the run's file's name.
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
                remedy="log in, or give logger.wandb.offline=true",
            )

    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> Any:
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        self.check()
        # Lightning's own offline=True sets WANDB_MODE for the whole process, and with it for the next job of a sweep.
        logger = WandbLogger(
            project=self.project,
            name=self.name or label,
            group=self.group or sweep,
            job_type=method,
            tags=list(self.tags),
            save_dir=str(folder),
            id=wandb_run_id(folder),
            # Several runs of one process may be open at once.
            settings=wandb.Settings(reinit="create_new", **({"mode": "offline"} if self.offline else {})),
        )
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
    """The id of the W&B run of the folder ``run``, the same for all its processes; None where W&B's agent names it."""
    if "WANDB_SWEEP_ID" in os.environ:
        return None
    file = run / "wandb" / "id"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_name(f"id.{secrets.token_hex(4)}")
        own.write_text(secrets.token_hex(4))
        with contextlib.suppress(FileExistsError):
            file.hardlink_to(own)  # torchrun's processes all come by here: the first one's counts
        own.unlink()
    return file.read_text()


@dataclass(frozen=True)
class TensorBoard(LoggerSettings):
    """Lightning's TensorBoard logger, writing to ``<run>/tensorboard``; needs the extra of that name."""

    def check(self) -> None:
        if not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
            raise UserError("not installed", key="logger.tensorboard", remedy="pip install 'sdtune[tensorboard]'")

    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> Any:
        from pytorch_lightning.loggers import TensorBoardLogger

        self.check()
        return TensorBoardLogger(str(folder), name="", version="tensorboard")
