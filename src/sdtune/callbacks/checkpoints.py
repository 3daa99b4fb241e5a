"""Checkpoints for resuming: atomic writes, on step boundaries, the last two and the best kept."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, ClassVar, NoReturn

import pytorch_lightning as pl
import torch
from annotated_types import Ge
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback

from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.errors import RESUMES, UserError
from sdtune.files import replacing
from sdtune.hardware.signals import STOP_SIGNALS
from sdtune.lightning_compat import PathLike
from sdtune.methods.base import Adapter
from sdtune.runs.layout import BEST


class AtomicIO(TorchCheckpointIO):
    """Writes beside the target, syncs, and renames: Lightning's own goes through TMPDIR and swallows some errors."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        target = Path(path)
        try:
            # Through a handle: torch's own writer does not say why it failed.
            with replacing(target, alone=True) as partial, partial.open("wb") as handle:
                torch.save(checkpoint, handle)
        except (OSError, RuntimeError) as error:
            if isinstance(error.__context__, OSError):  # torch's zip writer hides the system's reason behind its own
                raise OSError(error.__context__.errno, error.__context__.strerror, str(target)) from error
            raise


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint in the run folder ``run``. Raises UserError if there is none."""
    found = sorted((run / "checkpoints").glob("step*.ckpt"))
    if not found:
        raise UserError(
            f"{run}/checkpoints holds no step*.ckpt: the run ended before its first checkpoint",
            key="resume",
            remedy="remove its folder, and train anew",
        )
    return found[-1]


class Checkpoints(Callback):
    """Saves every so many optimizer steps, when the run ends, and when it is asked to stop.

    Ctrl-C and SIGTERM ask it to stop: it ends the step, saves, and leaves ``stopped_by`` set. A second Ctrl-C ends at
    once, and so does the first before training, while caches fill: what they hold is kept. The last two checkpoints
    stay and, where there is validation, ``best.ckpt`` by the validation loss.
    """

    priority: ClassVar[int] = 100

    def __init__(self, folder: Path, record: MetricsRecorder, every_steps: Annotated[int, Ge(1)] = 100) -> None:
        self.folder, self.record, self.every_steps = folder, record, every_steps
        self.stopped_by: signal.Signals | None = None
        self._handlers: dict[int, Any] = {}
        self._training = False
        self._due = False

    # --- asked to stop

    def ask(self, number: int) -> None:
        """Have the run end its step, save and stop."""
        self.stopped_by = signal.Signals(number)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if not self._training:
            self._leave("before the first step; what the caches hold is kept, the same command goes on", number)
        if self.stopped_by is not None and number == signal.SIGINT:
            self._leave(f"at once; {RESUMES}", number)
        self.ask(number)

    @staticmethod
    def _leave(how: str, number: int) -> NoReturn:
        print(f"sdtune: stopped {how}", file=sys.stderr)
        raise SystemExit(128 + number)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = True
        self._listen()  # Lightning has taken SIGTERM in the meantime

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # of several runs in one process; whoever has started them listens
        for number in STOP_SIGNALS:
            before = signal.signal(number, self._heard)
            self._handlers.setdefault(number, before)

    def restore_handlers(self) -> None:
        """Give SIGINT and SIGTERM back to whoever had them. Call it after ``fit``, which sets SIGTERM as it ends."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _asked(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size == 1:
            return self.stopped_by is not None
        # Processes hear a signal at different steps, so they agree, and only where they wait for each other anyway.
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return False
        return bool(trainer.strategy.reduce_boolean_decision(self.stopped_by is not None, all=False))

    # --- saving

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._asked(trainer):
            self.stopped_by = self.stopped_by or signal.SIGTERM
            if not self._validates(trainer):
                # Lightning would validate once more because it stops, which a run never stopped does not.
                trainer.limit_val_batches = 0
            trainer.should_stop = True
        due = trainer.global_step % self.every_steps == 0 or trainer.global_step == trainer.max_steps
        self._due = due or trainer.should_stop
        # A step's validation belongs to its checkpoint: resumed, Lightning would pass over it.
        if self._due and not self._validates(trainer):
            self.save(trainer, pl_module)

    @staticmethod
    def _validates(trainer: pl.Trainer) -> bool:
        """Whether Lightning validates right after the micro-batch just made."""
        # Lightning takes an empty list of images for a validation too, and then passes over it.
        if not trainer.enable_validation or not trainer.datamodule.held_out:  # type: ignore[attr-defined]
            return False
        every = trainer.val_check_batch
        return every is not None and (trainer.fit_loop.total_batch_idx + 1) % every == 0

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``step<N>.ckpt``, metrics first: a step that was not finite ends the run here and is never saved."""
        assert isinstance(pl_module, Adapter)
        self._due = False
        self.record.flush(trainer, pl_module)
        with self.record.paused():
            trainer.save_checkpoint(self.folder / f"step{trainer.global_step:08d}.ckpt")
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step*.ckpt"))[:-2]:
                old.unlink()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = self.record.validation.get(trainer.global_step)
        if value is not None and value <= min(self.record.validation.values()):
            with self.record.paused():
                trainer.save_checkpoint(self.folder / BEST)
        if (self._due or trainer.should_stop) and not trainer.sanity_checking:
            self.save(trainer, pl_module)
