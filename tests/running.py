"""Runs on the tiny backbone: Lightning fits, and commands in this process or in a subprocess."""

from __future__ import annotations

import csv
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from sdtune.cli.main import main
from sdtune.data import Folder
from sdtune.planning.meter import Meter

torch.set_num_threads(1)  # a tiny model gains nothing from more, and bitwise comparison needs equal thread counts

EPS = "optimizer.eps=1e-5"
"""AdamW's epsilon for comparisons in float32. A random model has gradients near the default epsilon of 1e-8, where
rounding errors would determine the step."""


def folder_data(path: Path, **settings: Any) -> Folder:
    return Folder(path=str(path), **{"batch_size": 2, **settings})


def adamw(lr: float) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    return lambda groups: torch.optim.AdamW(groups, lr=lr, fused=True)


def fit(
    model: pl.LightningModule, data: Folder, steps: int, callbacks: Sequence[Callback] = (), **arguments: Any
) -> pl.Trainer:
    """Train with Lightning, without Hydra."""
    checkpoint = arguments.pop("ckpt_path", None)
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **arguments,
        },
    )
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer


class Spy(Callback):
    """Records the losses, learning rates and gradients of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.validation: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.trainable()})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.losses.append(float(pl_module.step_metrics["loss"]))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.validation.append(float(trainer.callback_metrics["validation_loss"]))


class StopAt(Callback):
    """Sends SIGTERM, as a job scheduler does, after optimizer step ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            signal.raise_signal(signal.SIGTERM)


class StopInValidation(Callback):
    """Sends SIGTERM to rank 0 once, in the first batch of the validation at ``step``; lists the batches in ``file``."""

    def __init__(self, step: int, file: str) -> None:
        self.step, self.file = step, Path(file)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        earlier = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        self.file.write_text(f"{earlier}{trainer.global_step}\n", encoding="utf-8")
        if trainer.global_step == self.step and str(self.step) not in earlier:
            signal.raise_signal(signal.SIGTERM)


class Poison(Callback):
    """Sets one gradient value to NaN in optimizer step ``step`` (counted from 1)."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step + 1 == self.step:
            pl_module.trainable()[0][1].grad.view(-1)[0] = float("nan")


class Threads(Callback):
    """Writes the number of torch threads of each process of a training."""

    def __init__(self, place: str) -> None:
        self.place = Path(place)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (self.place / f"{trainer.global_rank}.threads").write_text(str(torch.get_num_threads()), encoding="utf-8")


class Rates(Callback):
    """Records the learning rates of all steps; for runs that are built from a config."""

    used: list[float] = []  # noqa: RUF012

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])


class ThirdStep(Callback):
    """Measures the third training step above weights, optimizer state and batch."""

    gradients_before = peak = -1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        if trainer.global_step != 2:
            return
        ThirdStep.gradients_before = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)
        state = [value for values in trainer.optimizers[0].state.values() for value in values.values()]
        known = [*pl_module.parameters(), *pl_module.buffers(), *state, *batch.values()]
        self.meter = Meter([value for value in known if isinstance(value, torch.Tensor)])
        self.meter.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            self.meter.__exit__(None, None, None)
            ThirdStep.peak = self.meter.activations


# --- commands


def arguments(tiny: Path, images: Path, folder: Path, *more: str) -> list[str]:
    """Overrides of a short LoRA run without sample images and evaluation."""
    return [
        "method=lora",
        "method.rank=2",
        "backbone=sd15",
        f"backbone.path={tiny}",
        "data=folder",
        f"data.path={images}",
        "callbacks.samples=null",
        "evaluation=none",
        "hardware=cpu",
        "hardware.precision=32-true",
        "lr_schedule.warmup_steps=0",
        "trainer.log_every_n_steps=1",
        f"hydra.run.dir={folder}",
        *more,
    ]


def sdtune(command: str, *argv: str) -> int:
    """Run ``sdtune <command>`` in this process and return the exit code."""
    root = logging.getLogger()
    previous = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sdtune", command, *argv])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            root.handlers[:], root.level = previous
    return 0


def train(*argv: str) -> int:
    """``sdtune train``."""
    return sdtune("train", *argv)


def prepare(*argv: str) -> int:
    """``sdtune prepare``."""
    return sdtune("prepare", *argv)


def sample(*argv: str) -> int:
    """``sdtune sample``."""
    return sdtune("sample", *argv)


def evaluate(*argv: str) -> int:
    """``sdtune evaluate``."""
    return sdtune("evaluate", *argv)


def plan(*argv: str) -> int:
    """``sdtune plan``."""
    return sdtune("plan", *argv)


def export(*argv: str) -> int:
    """``sdtune export``."""
    return sdtune("export", *argv)


def start(log: Path, *argv: str) -> subprocess.Popen[bytes]:
    """Start ``python -m sdtune train`` as a subprocess with its output in ``log``."""
    with log.open("wb") as handle:
        return subprocess.Popen(
            [sys.executable, "-m", "sdtune", "train", *argv],
            stdout=handle,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # its own process group, so that a test can signal it as a terminal does
        )


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int, log: Path) -> None:
    """Wait until ``metrics.csv`` has a row of ``step``.

    The number of rows is not the number of steps, because validations have rows too.
    """
    file = run / "metrics.csv"
    deadline = time.monotonic() + 280
    while not (file.exists() and f"\n{step}," in file.read_text(encoding="utf-8")):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, f"step {step} not reached in 280 s"
        time.sleep(0.002)


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv``."""
    with (run / "metrics.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))
