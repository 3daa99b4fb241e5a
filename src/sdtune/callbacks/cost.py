"""What a run costs: parameters, bytes, memory, time."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from sdtune.callbacks.record import Record
from sdtune.data import PictureData
from sdtune.methods.base import Adapter

log = logging.getLogger("sdtune")

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Cost(Callback):
    """Starts the memory peak anew when training starts: it would otherwise never fall between jobs of a process."""

    peak: int | None = None
    """Bytes; None where nothing was trained, as after resuming a run that had only its figures to make."""

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
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        elif _CLEAR_REFS.exists():
            # Some containers forbid it; the peak then counts from the start of the process.
            with suppress(PermissionError):
                _CLEAR_REFS.write_text("5")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.peak = _peak(pl_module.device)

    def figures(
        self, adapter: Adapter, data: PictureData, record: Record, artifact: Path
    ) -> dict[str, int | float | None]:
        """``peak_memory_bytes`` is the accelerator's allocations, on a CPU the process's resident memory."""
        step = record.median_step_seconds()
        return {
            "trainable_parameters": sum(p.numel() for _, p in adapter.trainable()),
            "artifact_bytes": sum(f.stat().st_size for f in artifact.rglob("*") if f.is_file()),
            "peak_memory_bytes": self.peak,
            "median_step_seconds": step,
            "images_per_second": data.batch_size / step if step else None,
        }


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if not _STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024
