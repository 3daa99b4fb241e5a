"""Check that all processes of a run have the same config and the same data."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sdtune.errors import UserError
from sdtune.training.collective import gathered

log = logging.getLogger("sdtune")


class ConfigAgreement(Callback):
    """Compare hashes of the composed ``config`` and of the data across the processes, before any weights are loaded.

    Without this check, a launcher that repeats the command line of a sweep could start a different job as the second
    process, and a machine whose copy of the images lacks one would train on others, without any error.
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
        data: str = trainer.datamodule.fingerprint[:16]  # type: ignore[attr-defined]
        # All processes must raise the error; a process that continued would wait for the others forever.
        for what, digest, remedy in (
            ("config", self.digest, "start every process with the same overrides"),
            ("images, captions or masks", data, "copy the same files to every machine"),
        ):
            digests = gathered(trainer, digest)
            other = next((rank for rank, value in enumerate(digests) if value != digests[0]), None)
            if other is not None:
                raise UserError(
                    f"process {other} was started with a different {what} ({digests[other]}) than process 0"
                    f" ({digests[0]})",
                    remedy=remedy,
                )
