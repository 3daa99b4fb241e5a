"""Cost metrics of a run: trainable parameters, artifact size, peak memory, time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.data import ImageDataModule
from sdtune.files import is_partial, is_snapshot
from sdtune.hardware.allocator import release
from sdtune.hardware.memory import peak_memory, reset_peak_memory
from sdtune.methods.base import Adapter
from sdtune.runs.layout import CARD, CARD_GRID

log = logging.getLogger("sdtune")


class CostMeter(Callback):
    """Measure the peak memory of the training steps, without previews and other runs.

    Args:
        shared: returns the peak memory in bytes of training steps that several runs compute together; None: this run
            measures its own steps.
    """

    priority: ClassVar[int] = -10

    peak: int | None = None
    """Peak memory in bytes, including the time before a resume; None if the system does not report it."""

    _started = False

    def __init__(self, shared: Callable[[], int | None] | None = None) -> None:
        self._shared = shared

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        trainable = pl_module.trainable()
        count, total = sum(p.numel() for _, p in trainable), sum(p.numel() for p in pl_module.parameters())
        log.info(
            "trainable: %s parameters in %d tensors, %.2f%% of %s",
            f"{count:,}",
            len(trainable),
            100 * count / total,
            f"{total:,}",
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._shared is not None:
            return
        if not self._started:
            self._started = True
            release()  # memory that loading and the first previews have left allocated
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
        """The cost metrics of the run, including the time before a resume.

        - ``trainable_parameters``: number of trainable parameters.
        - ``artifact_bytes``: size of all export formats, without snapshots and the model card.
        - ``peak_memory_bytes``: peak of the training steps: allocated memory of the accelerator, or on a CPU the
          resident memory of the process, including Python and libraries.
        - ``median_step_seconds``: median time of an optimizer step, without previews, validation and checkpoints.
        - ``images_per_second``: training images per second, including class images.
        - ``seconds_to_best``: median step time multiplied by the step with the lowest validation loss.
        """
        step = record.median_step_seconds()
        best = min(record.validation, key=lambda s: record.validation[s], default=None)
        return {
            "trainable_parameters": sum(p.numel() for _, p in adapter.trainable()),
            "artifact_bytes": sum(
                f.stat().st_size
                for f in artifact.rglob("*")
                if f.is_file()
                and not is_snapshot(f.stem)
                and not any(map(is_partial, (f, *f.relative_to(artifact).parents)))
                and not (f.parent == artifact and f.name in (CARD, CARD_GRID))
            ),
            "peak_memory_bytes": self.peak,
            "median_step_seconds": step,
            "images_per_second": data.batch_size * (2 if data.has_prior else 1) / step if step else None,
            "seconds_to_best": best * step if best is not None and step else None,
        }
