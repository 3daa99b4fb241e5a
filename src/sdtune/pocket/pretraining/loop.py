"""Training loop for pocket's VAE, CLIP and classifier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset


class Batches(Protocol):
    """Batch of each optimizer step, as a pure function of the step, so that a resumed training repeats no batch."""

    def __call__(self, step: int) -> dict[str, Any]: ...


class _Steps(Dataset[dict[str, Any]]):
    def __init__(self, batches: Batches, start: int, steps: int) -> None:
        self.batches, self.start, self.steps = batches, start, steps

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches(self.start + index)


class Pretraining(pl.LightningModule):
    """LightningModule with AdamW, linear warm-up and cosine decay to zero; subclasses define ``training_step``."""

    def __init__(self, lr: float, steps: int, weight_decay: float = 0.01) -> None:
        super().__init__()
        self.lr, self.steps, self.weight_decay = lr, steps, weight_decay

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.98))
        warmup_steps = max(1, self.steps // 50)

        def lr_factor(step: int) -> float:
            return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _LossLog(Callback):
    """Callback that prints the losses every 100 steps and appends them to a log file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % 100 == 0:
            values = " ".join(f"{k}={float(v):.5f}" for k, v in outputs.items())
            line = f"step {trainer.global_step} {values}"
            print(line, flush=True)
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")


def pretrain(module: Pretraining, batches: Batches, folder: Path, workers: int = 1) -> None:
    """Train ``module`` for its number of steps; resumes from ``last.ckpt`` in ``folder`` if it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.ckpt"
    start = 0
    if last.exists():
        start = int(torch.load(last, map_location="cpu", weights_only=True)["global_step"])
    if start >= module.steps:
        module.load_state_dict(torch.load(last, map_location="cpu", weights_only=True)["state_dict"])
        return
    checkpoint = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0, every_n_train_steps=250)
    trainer = pl.Trainer(
        max_steps=module.steps,
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[checkpoint, _LossLog(folder / "training.log")],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loader = DataLoader(_Steps(batches, start, module.steps), batch_size=None, num_workers=workers, shuffle=False)
    trainer.fit(module, loader, ckpt_path=last if start else None)
    trainer.save_checkpoint(last)
