"""Checkpoints for resuming: written atomically at optimizer steps; the last two and the best are kept."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import zipfile
import zlib
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, ClassVar, NoReturn

import pytorch_lightning as pl
import torch
from annotated_types import Ge
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn

from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.errors import RESUME_ADVICE, UserError
from sdtune.files import replacing
from sdtune.hardware.signals import STOP_SIGNALS
from sdtune.lightning_compat import PathLike, disable_sigterm_agreement, run_validation
from sdtune.methods.base import Adapter
from sdtune.runs.layout import BEST


class AtomicIO(TorchCheckpointIO):
    """Checkpoint IO that writes a temporary file in the target folder, syncs it and renames it.

    Lightning's own implementation writes through TMPDIR and hides some errors.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        target = Path(path)
        try:
            # Write through a file object: torch's own file writer does not report the reason of a failure.
            with replacing(target, alone=True) as partial, partial.open("wb") as handle:
                torch.save(checkpoint, handle)
        except (OSError, RuntimeError) as error:
            if isinstance(error.__context__, OSError):  # torch's zip writer replaces the system error
                raise OSError(error.__context__.errno, error.__context__.strerror, str(target)) from error
            raise


def last_checkpoint(run: Path) -> Path | None:
    """The newest intact checkpoint in the run folder ``run``; None if the run ended before its first checkpoint.

    A copy or a full disk may have cut the newest one short.

    Raises:
        UserError: all checkpoints are damaged.
    """
    newest_first = sorted((run / "checkpoints").glob("step*.ckpt"), reverse=True)
    intact = next(filter(is_intact, newest_first), None)
    if newest_first and intact is None:
        raise UserError(
            f"all checkpoints are damaged, the newest is {newest_first[0]}",
            key="resume",
            remedy="delete them to train from the beginning",
        )
    return intact


def is_intact(file: Path) -> bool:
    """Whether ``file`` is a complete zip archive, the format of ``torch.save``, with correct checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError, RuntimeError):
        return False


LARGE = 2 * 2**30
"""Bytes of a checkpoint that takes so long to write that the default interval is longer."""


AGREEMENT_SECONDS = 10.0
"""Longest time between two steps after which several processes agree on whether to stop."""


class Agreement:
    """Agreement of several processes on whether to stop: after log steps, and about every ten seconds.

    Each agreement waits for the device and for the slowest process. All processes compute the same next step from the
    longest mean step time of any process.

    Args:
        step: optimizer step at which the training starts.
    """

    def __init__(self, step: int = 0) -> None:
        self._next_step = self._last_step = step
        self._last_time = time.monotonic()

    def is_stop_requested(self, trainer: pl.Trainer, is_requested: bool) -> bool:
        """Whether any process requests a stop; False between two agreements.

        Args:
            is_requested: whether this process requests it.
        """
        step, now, log_steps = trainer.global_step, time.monotonic(), trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step < self._next_step and step % log_steps:
            return False
        seconds = (now - self._last_time) / max(1, step - self._last_step)
        values = torch.tensor([float(is_requested), seconds], device=trainer.strategy.root_device)
        answer, slowest = trainer.strategy.reduce(values, reduce_op="max").tolist()
        self._last_step, self._last_time = step, now
        self._next_step = step + max(1, int(AGREEMENT_SECONDS / max(slowest, 1e-6)))
        return bool(answer)


class Checkpoints(Callback):
    """Save a checkpoint every ``every_steps`` optimizer steps, at the end of the run, and when the run must stop.

    By default every 100 steps, or every 500 if a checkpoint is larger than :data:`LARGE`.
    Ctrl-C, SIGTERM and SIGHUP request a stop: the run completes the step, saves, and leaves ``stopped_by`` set; no
    samples are generated any more. A validation ends after the current batch; the resumed run repeats it from its
    beginning. A second Ctrl-C ends the process immediately. So does the first signal before the training starts, for
    example while the caches are filled; cached entries are kept. The last two checkpoints are kept and, with a
    validation set, ``best.ckpt``, the one with the lowest validation loss.
    """

    priority: ClassVar[int] = 100

    def __init__(self, folder: Path, record: MetricsRecorder, every_steps: Annotated[int, Ge(1)] | None = None) -> None:
        self.folder, self.record, self.every_steps = folder, record, every_steps
        self.stopped_by: signal.Signals | None = None
        self._validation_pending = False
        self._handlers: dict[int, Any] = {}
        self._training = False
        self._due = False
        self._interval = every_steps or 100
        self._agreement = Agreement()

    def _default_interval(self, module: pl.LightningModule) -> int:
        """Optimizer steps between checkpoints if ``every_steps`` is None."""
        # The trained weights, and two moments for each of them in the optimizer.
        size = sum(3 * p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        return 100 if size < LARGE else 500

    # --- stop requests

    def request_stop(self, number: int) -> None:
        """Request a stop by signal ``number``: the run completes the step, saves and ends."""
        self.stopped_by = signal.Signals(number)
        self.record.stop_requested = True

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._training:
            self._exit_immediately("before the first step; caches are kept; repeat the command to continue", number)
        if self.stopped_by is not None and number == signal.SIGINT:
            self._exit_immediately(f"immediately; {RESUME_ADVICE}", number)
        if self.stopped_by is None:
            with contextlib.suppress(OSError):
                # Not print: the signal may have interrupted another print to the same stream.
                os.write(2, b"sdtune: stopping and saving after the current step; Ctrl-C again stops immediately\n")
        self.request_stop(number)

    @staticmethod
    def _exit_immediately(how: str, number: int) -> NoReturn:
        with contextlib.suppress(OSError):
            os.write(2, f"sdtune: stopped {how}\n".encode())
        raise SystemExit(128 + number)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._install_handlers()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._interval = self.every_steps or self._default_interval(pl_module)
        self._training = True
        self._agreement = Agreement(trainer.global_step)
        disable_sigterm_agreement(trainer)
        self._install_handlers()  # Lightning has installed its own SIGTERM handler in the meantime
        if self._validation_pending:
            self._prepare_pending_validation(trainer)
            run_validation(trainer)

    def validate_if_pending(self, trainer: pl.Trainer, module: Adapter) -> None:
        """Repeat a validation after the last step that a stop has aborted. Call it after ``fit``, which trains no more.

        The hook ``on_train_start``, which repeats the other validations, is not called then.
        """
        if self._validation_pending and self.stopped_by is None:
            self._training = True
            self._prepare_pending_validation(trainer)
            trainer.validate(module, datamodule=trainer.datamodule, verbose=False)  # type: ignore[attr-defined]

    def _prepare_pending_validation(self, trainer: pl.Trainer) -> None:
        self._validation_pending = False
        self.record.truncate(trainer.global_step, trainer, keep_validation=False)

    def _install_handlers(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # one of several runs in this process; the main thread handles the signals for all of them
        for number in STOP_SIGNALS:
            previous = signal.signal(number, self._handle_signal)
            self._handlers.setdefault(number, previous)

    def restore_handlers(self) -> None:
        """Restore the previous handlers of the stop signals. Call it after ``fit``, which sets SIGTERM when it ends."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _stop_requested(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size == 1:
            return self.stopped_by is not None
        # Processes receive a signal at different steps.
        if trainer.training:
            return self._agreement.is_stop_requested(trainer, self.stopped_by is not None)
        return bool(trainer.strategy.reduce_boolean_decision(self.stopped_by is not None, all=False))

    # --- saving

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._stop_requested(trainer):
            self.request_stop(self.stopped_by or signal.SIGTERM)
            if not self._validates(trainer):
                # Lightning would validate before it stops; an uninterrupted run has no validation at this step.
                trainer.limit_val_batches = 0
            trainer.should_stop = True
        due = trainer.global_step % self._interval == 0 or trainer.global_step == trainer.max_steps
        self._due = due or trainer.should_stop
        # If this step has a validation, save after it: a resumed run would skip the validation.
        if self._due and not self._validates(trainer):
            self.save(trainer, pl_module)

    @staticmethod
    def _validates(trainer: pl.Trainer) -> bool:
        """Whether Lightning validates right after the current micro-batch."""
        # With an empty validation set, Lightning enables validation and then skips it.
        if not trainer.enable_validation or not trainer.datamodule.held_out:  # type: ignore[attr-defined]
            return False
        interval = trainer.val_check_batch
        return interval is not None and (trainer.fit_loop.total_batch_idx + 1) % interval == 0

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the pending metrics, then ``step<N>.ckpt``; a non-finite step raises NotFinite and is never saved."""
        assert isinstance(pl_module, Adapter)
        self._due = False
        self.record.flush(trainer, pl_module)
        with self.record.paused():
            trainer.save_checkpoint(self.folder / f"step{trainer.global_step:08d}.ckpt")
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step*.ckpt"))[:-2]:
                old.unlink()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.record.validation_aborted = False
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._install_handlers()  # Lightning has installed its own SIGTERM handler, as before a training

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking or not self._stop_requested(trainer):
            return
        self.request_stop(self.stopped_by or signal.SIGTERM)
        assert isinstance(pl_module, Adapter)
        pl_module.validation_aborted = True
        self._validation_pending = self.record.validation_aborted = trainer.should_stop = True
        raise StopIteration  # ends Lightning's loop over the validation batches

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.record.validation_aborted:
            self.save(trainer, pl_module)
            return
        value = self.record.validation.get(trainer.global_step)
        if value is not None and value <= min(self.record.validation.values()):
            with self.record.paused():
                trainer.save_checkpoint(self.folder / BEST)
        if (self._due or trainer.should_stop) and not trainer.sanity_checking:
            self.save(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"validation_pending": self._validation_pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validation_pending = state_dict["validation_pending"]
