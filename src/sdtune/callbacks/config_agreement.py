"""Check that all processes of a run have the same config."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sdtune.errors import UserError

log = logging.getLogger("sdtune")


class ConfigAgreement(Callback):
    """Compare a hash of the composed ``config`` across the processes, before any weights are loaded.

    Without this check, a launcher that repeats the command line of a sweep could start a different job as the second
    process, without any error.
    """

    priority: ClassVar[int] = -50

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        self.rate = config["optimizer"].get("lr")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        log.info("process %d of %d: config %s, optimizer.lr %s",
                 trainer.global_rank, trainer.world_size, self.digest, self.rate)  # fmt: skip
        first_digest = trainer.strategy.broadcast(self.digest)
        if first_digest != self.digest:
            raise UserError(
                f"process {trainer.global_rank} was started with a different config ({self.digest}) than"
                f" process 0 ({first_digest})",
                remedy="start every process with the same overrides",
            )
