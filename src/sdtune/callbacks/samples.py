"""Sample images of fixed prompts and seeds: before, during and after training; intermediate artifacts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytorch_lightning as pl
import torch
from annotated_types import Ge
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.data.previews import PreviewPrompt, preview_prompts
from sdtune.images.grids import grid, save_png
from sdtune.methods.base import Adapter
from sdtune.sampling.loop import Request, Sampling, generate

log = logging.getLogger("sdtune")


class Samples(Callback):
    """Draws ``samples/step<N>.png`` and, at the end, ``samples/before_after.png``.

    Where the data has control maps, a prompt is drawn under that of a held-out (or else a training) image, and the
    maps are the grid's first row.

    Args:
        prompts: one column each; the data's own captions, at most four, if None.
        seeds: one row each.
        every_steps: how often on the way; None: only before and after.
        sampling: how.
    """

    def __init__(
        self,
        folder: Path,
        record: MetricsRecorder,
        prompts: Sequence[str] | None = None,
        seeds: Sequence[int] = (0, 1),
        every_steps: Annotated[int, Ge(1)] | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.folder, self.record = folder, record
        self.prompts, self.seeds, self.every_steps = list(prompts or ()), list(seeds), every_steps
        self.sampling = sampling or Sampling()
        self.wanted: list[PreviewPrompt] = []
        self.first: list[list[np.ndarray]] | None = None
        self._finished = False

    def draw(self, trainer: pl.Trainer, module: Adapter) -> list[list[np.ndarray]]:
        """Rows by seed, columns by prompt, from the weights that the run would leave behind now."""
        modes = {m: m.training for m in module.modules()}
        module.eval()
        requests = [Request(one.prompt, seed, one.maps) for seed in self.seeds for one in self.wanted]

        def denoise(noisy: Tensor, timestep: Tensor, text: Tensor, maps: Sequence[Tensor]) -> Tensor:
            return module.denoise(noisy, timestep, text, {"control": maps[0]} if maps else {})

        with module.final_weights(), module.offloaded.back(), trainer.precision_plugin.forward_context():
            images = list(generate(module.backbone, requests, self.sampling, denoise))
        for m, training in modes.items():
            m.training = training
        columns = len(self.wanted)
        return [images[i : i + columns] for i in range(0, len(images), columns)]

    def sheet(self, rows: list[list[np.ndarray]], labels: list[str]) -> Image.Image:
        """``rows`` under their prompts and, where there are any, the control maps."""
        maps = [[one.maps[0] for one in self.wanted]] if self.wanted[0].maps else []
        return grid([*maps, *rows], [*("control" for _ in maps), *labels], [one.prompt for one in self.wanted])

    def save(self, trainer: pl.Trainer, module: Adapter, path: Path) -> list[list[np.ndarray]]:
        """Draw and write a grid to ``path``."""
        with self.record.paused():
            rows = self.draw(trainer, module)
            sheet = self.sheet(rows, [f"seed {seed}" for seed in self.seeds])
            save_png(sheet, path, {"step": str(trainer.global_step)})
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image("samples", [np.asarray(sheet)], step=trainer.global_step)
        return rows

    def _keep(self, rows: list[list[np.ndarray]], when: str) -> None:
        """Single images, for reports that lay several runs side by side."""
        for seed, row in zip(self.seeds, rows, strict=True):
            for number, (one, image) in enumerate(zip(self.wanted, row, strict=True)):
                about = {"prompt": one.prompt, "seed": str(seed)}
                save_png(image, self.folder / when / f"{number:03d}_seed{seed}.png", about)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        self._want(trainer, pl_module)
        if trainer.is_global_zero and trainer.global_step == 0:
            log.info("samples: %d before training", len(self.wanted) * len(self.seeds))
            self.first = self.save(trainer, pl_module, self.folder / "step00000000.png")
            self._keep(self.first, "before")

    def _want(self, trainer: pl.Trainer, module: Adapter) -> None:
        size = self.sampling.size(module.backbone.facts.side)
        self.wanted = preview_prompts(trainer.datamodule, self.prompts, 4, size)  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Adapter)
        due = self.every_steps and trainer.global_step % self.every_steps == 0
        boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if due and boundary and trainer.is_global_zero and trainer.global_step < trainer.max_steps:
            self.save(trainer, pl_module, self.folder / f"step{trainer.global_step:08d}.png")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        if trainer.is_global_zero:
            self._finish(trainer, pl_module)

    def complete(self, trainer: pl.Trainer, module: Adapter) -> None:
        """After ``fit``: draw the last samples where training was over already, and Lightning has begun nothing."""
        if self._finished or not trainer.is_global_zero:
            return
        self._want(trainer, module)
        module.to(trainer.strategy.root_device)
        self._finish(trainer, module)
        module.to("cpu")

    def _finish(self, trainer: pl.Trainer, module: Adapter) -> None:
        self._finished = True
        last = self.save(trainer, module, self.folder / f"step{trainer.global_step:08d}.png")
        self._keep(last, "after")
        if self.first is not None:
            rows = [row for pair in zip(self.first, last, strict=True) for row in pair]
            labels = [f"{when}, seed {seed}" for seed in self.seeds for when in ("before", "after")]
            save_png(self.sheet(rows, labels), self.folder / "before_after.png")
            for logger in trainer.loggers:
                if hasattr(logger, "log_table"):
                    self._log_table(logger, last, trainer.global_step)

    def _log_table(self, logger: Any, last: list[list[np.ndarray]], step: int) -> None:
        """W&B's: one row per prompt and seed."""
        import wandb

        assert self.first is not None
        rows = [
            [one.prompt, seed, wandb.Image(before), wandb.Image(after)]
            for seed, first, now in zip(self.seeds, self.first, last, strict=True)
            for one, before, after in zip(self.wanted, first, now, strict=True)
        ]
        logger.log_table("before_after", columns=["prompt", "seed", "before", "after"], data=rows, step=step)

    def state_dict(self) -> dict[str, Any]:
        first = None if self.first is None else torch.from_numpy(np.array(self.first))
        return {"first": first, "drawn_by": self._how()}

    def _how(self) -> str:
        return repr((self.sampling, self.seeds))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Images by other settings are no "before" to these.
        first = state_dict["first"] if state_dict.get("drawn_by", self._how()) == self._how() else None
        self.first = None if first is None else [list(row) for row in first.numpy()]


class Snapshots(Callback):
    """Writes the artifact every ``every_steps`` optimizer steps, so that the best moment can be picked by eye."""

    def __init__(self, folder: Path, name: str, every_steps: Annotated[int, Ge(1)], samples: Samples | None) -> None:
        self.folder, self.name, self.every_steps, self.samples = folder, name, every_steps, samples

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Adapter)
        boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not boundary or trainer.global_step % self.every_steps or not trainer.is_global_zero:
            return
        mark = f"-step{trainer.global_step:08d}"
        stem = self.name + mark
        with pl_module.final_weights():
            pl_module.snapshot(self.folder / "artifact", stem, mark)
        if self.samples is not None:
            self.samples.save(trainer, pl_module, self.folder / "samples" / f"{stem}.png")
