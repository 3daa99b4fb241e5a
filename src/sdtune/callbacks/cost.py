"""A run's cost: trainable parameters, bytes, peak memory, time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.data import ImageDataModule
from sdtune.files import is_partial
from sdtune.formats.embeddings import intermediate
from sdtune.hardware.allocator import release
from sdtune.hardware.memory import peak_memory, reset_peak_memory
from sdtune.methods.base import Adapter
from sdtune.runs.layout import CARD, CARD_GRID

log = logging.getLogger("sdtune")


class CostMeter(Callback):
    """Takes the memory's peak over the training steps alone: previews and other jobs have peaks of their own.

    Args:
        shared: the peak in bytes so far of steps that several runs take together, which this one cannot take itself.
    """

    priority: ClassVar[int] = -10

    peak: int | None = None
    """Bytes, of all processes that the run has had; None where the system does not say."""

    _begun = False

    def __init__(self, shared: Callable[[], int | None] | None = None) -> None:
        self._shared = shared

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        opened = pl_module.trainable()
        count, whole = sum(p.numel() for _, p in opened), sum(p.numel() for p in pl_module.parameters())
        log.info(
            "trained: %s parameters in %d tensors, %.2f%% of %s",
            f"{count:,}",
            len(opened),
            100 * count / whole,
            f"{whole:,}",
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._shared is not None:
            return
        if not self._begun:
            self._begun = True
            release()  # of what loading and the first previews have left
        reset_peak_memory(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        peak = peak_memory(pl_module.device) if self._shared is None else self._shared()
        if peak is not None:
            self.peak = max(self.peak or 0, peak)

    def state_dict(self) -> dict[str, Any]:
        return {"peak": self.peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.peak = state_dict["peak"]

    def metrics(
        self, adapter: Adapter, data: ImageDataModule, record: MetricsRecorder, artifact: Path
    ) -> dict[str, int | float | None]:
        """What the run has cost.

        ``trainable_parameters`` is a count, ``artifact_bytes`` that of every form of the artifact without those of
        steps on the way. ``peak_memory_bytes``: of the training steps, the accelerator's allocations, or on a CPU the
        resident memory of the whole process, Python and libraries included. ``median_step_seconds``: of the optimizer
        steps, without previews, validation and checkpoints. ``images_per_second``: images that went through the
        model, both of a pair with its class. ``seconds_to_best``: median step times the step of the least validation
        loss. Where the run was resumed, its processes count together.
        """
        step = record.median_step_seconds()
        best = min(record.validation, key=lambda s: record.validation[s], default=None)
        return {
            "trainable_parameters": sum(p.numel() for _, p in adapter.trainable()),
            "artifact_bytes": sum(
                f.stat().st_size
                for f in artifact.rglob("*")
                if f.is_file()
                and not intermediate(f.stem)
                and not any(map(is_partial, (f, *f.relative_to(artifact).parents)))
                and not (f.parent == artifact and f.name in (CARD, CARD_GRID))
            ),
            "peak_memory_bytes": self.peak,
            "median_step_seconds": step,
            "images_per_second": data.batch_size * (2 if data.has_prior else 1) / step if step else None,
            "seconds_to_best": best * step if best is not None and step else None,
        }
