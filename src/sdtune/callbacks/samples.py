"""Sample images from fixed prompts and seeds before, during and after training; intermediate artifacts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from annotated_types import Ge
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sdtune.backbone.controlnet import ConditionEncoder
from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.conditioning import Conditioning
from sdtune.data.previews import PreviewPrompt, preview_prompts
from sdtune.images.grids import grid, save_png
from sdtune.methods.base import Adapter
from sdtune.progress import track
from sdtune.sampling.loop import Request, Sampling, Seed, generate
from sdtune.sampling.prompts import warn_about_truncated_prompts

log = logging.getLogger("sdtune")


class _StopRequested(Exception):
    """Interrupts the generation of samples because the run will stop."""


@dataclass(frozen=True)
class _Stoppable:
    """A :class:`~sdtune.sampling.loop.Predictor`: the method, until the run is asked to stop."""

    module: Adapter
    record: MetricsRecorder

    @property
    def condition_encoder(self) -> ConditionEncoder | None:
        return self.module.condition_encoder

    def denoise(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        if self.record.stop_requested:
            raise _StopRequested
        return self.module.denoise(noisy, timesteps, conditioning, conditions)


class Samples(Callback):
    """Generate the grids ``samples/step<N>.png`` with their images in ``step<N>/``, and ``samples/before_after.png``.

    If the data has control maps, each prompt uses the map of a held-out image (of a training image if none is held
    out), and the first row of the grid shows the maps.

    Args:
        prompts: one column per prompt; None: at most four captions of the data.
        seeds: one row per seed.
        every_steps: optimizer steps between grids during training; ``auto``: a third of the run, so that there are two
            grids on the way; None: only before and after training.
        sampling: sampler settings.
    """

    def __init__(
        self,
        folder: Path,
        record: MetricsRecorder,
        prompts: Sequence[str] | None = None,
        seeds: Sequence[Seed] = (0, 1),
        every_steps: Annotated[int, Ge(1)] | Literal["auto"] | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.folder, self.record = folder, record
        self.prompts, self.seeds, self.every_steps = list(prompts or ()), list(seeds), every_steps
        self.sampling = sampling or Sampling()
        self.wanted: list[PreviewPrompt] = []
        self.first: list[list[np.ndarray]] | None = None
        self._finished = False

    def draw(self, trainer: pl.Trainer, module: Adapter) -> list[list[np.ndarray]]:
        """Generate images with the weights that the run would export now; one row per seed, one column per prompt."""
        training_modes = {m: m.training for m in module.modules()}
        module.eval()
        requests = [Request(preview.prompt, seed, preview.conditions) for seed in self.seeds for preview in self.wanted]
        try:
            with module.final_weights(), module.cpu_offload.on_device(), trainer.precision_plugin.forward_context():
                generated = generate(module.backbone, requests, self.sampling, _Stoppable(module, self.record))
                images = list(track("Sample images", generated, len(requests)))
        finally:
            for m, training in training_modes.items():
                m.training = training
        columns = len(self.wanted)
        return [images[i : i + columns] for i in range(0, len(images), columns)]

    def sheet(self, rows: list[list[np.ndarray]], labels: list[str]) -> Image.Image:
        """Grid of ``rows`` with the prompts as column titles; conditions, such as control maps, are the first rows."""
        names = list(self.wanted[0].conditions)
        conditions = [[preview.conditions[name] for preview in self.wanted] for name in names]
        return grid([*conditions, *rows], [*names, *labels], [preview.prompt for preview in self.wanted])

    def save(self, trainer: pl.Trainer, module: Adapter, path: Path) -> list[list[np.ndarray]]:
        """Generate a grid, write it to ``path`` and its images to ``step<N>/``, and log the grid."""
        with self.record.paused():
            rows = self.draw(trainer, module)
            sheet = self.sheet(rows, [f"seed {seed}" for seed in self.seeds])
            save_png(sheet, path, {"step": str(trainer.global_step)})
            self._write_images(rows, f"step{trainer.global_step:08d}")
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image("samples", [np.asarray(sheet)], step=trainer.global_step)
        return rows

    def _write_images(self, rows: list[list[np.ndarray]], subfolder: str) -> None:
        """Write single images, for reports that compare several runs."""
        for seed, row in zip(self.seeds, rows, strict=True):
            for number, (preview, image) in enumerate(zip(self.wanted, row, strict=True)):
                metadata = {"prompt": preview.prompt, "seed": str(seed)}
                save_png(image, self.folder / subfolder / f"{number:03d}_seed{seed}.png", metadata)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        self._set_prompts(trainer, pl_module)
        if trainer.is_global_zero and trainer.global_step == 0:
            with suppress(_StopRequested):
                self.first = self.save(trainer, pl_module, self.folder / "step00000000.png")

    def _set_prompts(self, trainer: pl.Trainer, module: Adapter) -> None:
        size = self.sampling.size(module.backbone.facts.side)
        self.wanted = preview_prompts(trainer.datamodule, self.prompts, 4, size)  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            texts = [*(preview.prompt for preview in self.wanted), self.sampling.negative_prompt]
            warn_about_truncated_prompts(module.backbone, texts)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Adapter)
        interval = -(-trainer.max_steps // 3) if self.every_steps == "auto" else self.every_steps
        due = interval and trainer.global_step % interval == 0
        boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if due and boundary and trainer.is_global_zero and trainer.global_step < trainer.max_steps:
            with suppress(_StopRequested):
                self.save(trainer, pl_module, self.folder / f"step{trainer.global_step:08d}.png")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        if trainer.is_global_zero:
            with suppress(_StopRequested):
                self._finish(trainer, pl_module)

    def complete(self, trainer: pl.Trainer, module: Adapter) -> None:
        """After ``fit``, generate the final samples if the training was complete and Lightning called no hook."""
        if self._finished or self.record.stop_requested or not trainer.is_global_zero:
            return
        self._set_prompts(trainer, module)
        module.to(trainer.strategy.root_device)
        with suppress(_StopRequested):
            self._finish(trainer, module)
        module.to("cpu")

    def _finish(self, trainer: pl.Trainer, module: Adapter) -> None:
        last = self.save(trainer, module, self.folder / f"step{trainer.global_step:08d}.png")
        self._finished = True
        if self.first is not None:
            rows = [row for pair in zip(self.first, last, strict=True) for row in pair]
            labels = [f"{state}, seed {seed}" for seed in self.seeds for state in ("before", "after")]
            save_png(self.sheet(rows, labels), self.folder / "before_after.png")
            for logger in trainer.loggers:
                if hasattr(logger, "log_table"):
                    self._log_table(logger, last, trainer.global_step)

    def _log_table(self, logger: Any, last: list[list[np.ndarray]], step: int) -> None:
        """Log a W&B table with one row per prompt and seed."""
        import wandb

        assert self.first is not None
        rows = [
            [preview.prompt, seed, wandb.Image(before), wandb.Image(after)]
            for seed, first, now in zip(self.seeds, self.first, last, strict=True)
            for preview, before, after in zip(self.wanted, first, now, strict=True)
        ]
        logger.log_table("before_after", columns=["prompt", "seed", "before", "after"], data=rows, step=step)

    def state_dict(self) -> dict[str, Any]:
        first = None if self.first is None else torch.from_numpy(np.array(self.first))
        return {"first": first, "drawn_by": self._settings()}

    def _settings(self) -> str:
        return repr((self.sampling, self.seeds))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Images generated with other settings are not comparable.
        first = state_dict["first"] if state_dict.get("drawn_by", self._settings()) == self._settings() else None
        self.first = None if first is None else [list(row) for row in first.numpy()]


class Snapshots(Callback):
    """Write a snapshot of the artifact every ``every_steps`` optimizer steps, so that the best can be chosen by eye."""

    def __init__(self, folder: Path, name: str, every_steps: Annotated[int, Ge(1)], samples: Samples | None) -> None:
        self.folder, self.name, self.every_steps, self.samples = folder, name, every_steps, samples

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Adapter)
        boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not boundary or trainer.global_step % self.every_steps or not trainer.is_global_zero:
            return
        suffix = f"-step{trainer.global_step:08d}"
        stem = self.name + suffix
        with pl_module.final_weights():
            pl_module.snapshot(self.folder / "artifact", stem, suffix)
        if self.samples is not None:
            with suppress(_StopRequested):
                self.samples.save(trainer, pl_module, self.folder / "samples" / f"{stem}.png")
