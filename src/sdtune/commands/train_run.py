"""``TrainRun``: one training run, from its checked config to its final metrics."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import pytorch_lightning as pl

from sdtune.backbone import Pretrained
from sdtune.callbacks.best_artifact import write_best
from sdtune.callbacks.checkpoints import AtomicIO, Checkpoints
from sdtune.callbacks.config_agreement import ConfigAgreement
from sdtune.callbacks.cost import CostMeter
from sdtune.callbacks.crowded_cores import CrowdedCores
from sdtune.callbacks.cuda_backends import CudaBackends
from sdtune.callbacks.data_summary import DataSummary
from sdtune.callbacks.metrics_recorder import MetricsRecorder, NotFinite
from sdtune.callbacks.order import by_priority
from sdtune.callbacks.pinned_allocation import PinnedAllocation
from sdtune.callbacks.progress_bar import ProgressBar
from sdtune.callbacks.samples import Samples
from sdtune.callbacks.training_images import TrainingImages
from sdtune.commands.describe import closing_lines, metrics_table
from sdtune.config.build import build
from sdtune.config.settings import Settings
from sdtune.data import ImageDataModule
from sdtune.errors import Pruned, RunFailed, Stopped, UserError
from sdtune.exporting import Export, find_artifact, write_card
from sdtune.exporting.previews import last_samples
from sdtune.files import remove_leftovers, write_json
from sdtune.hardware.child_processes import wait_for_children
from sdtune.hardware.out_of_memory import ADVICE, is_out_of_memory
from sdtune.hardware.processes import is_global_zero
from sdtune.hardware.signals import STOP_SIGNALS
from sdtune.loggers import LoggerSettings
from sdtune.methods.base import Adapter
from sdtune.quoting import shell_override
from sdtune.runs.layout import CARD, TRAINING_IMAGES
from sdtune.runs.metrics import finite
from sdtune.runs.names import label_and_sweep
from sdtune.sampling.run_models import RunModels
from sdtune.shared_backbone.session import SharedBackbone
from sdtune.training.release import release_backbone

log = logging.getLogger("sdtune")


@dataclass(frozen=True)
class TrainRun:
    """A checked training run with all its parts; loads no weights before :meth:`start`.

    Args:
        config: the resolved config; it is only recorded and compared.
        settings: top-level settings of the run.
        folder: the run folder, where all output is written.
        data, adapter, loggers, exports: built from the config.
        evaluation: built from the config; None for ``evaluation=none``.
        record, checkpoints: callbacks that every run has.
        callbacks: the configured callbacks, without those that every run has.
        trainer: config of Lightning's Trainer.
        micro_batch: samples per micro-batch and process.
        checkpoint: checkpoint from which the run continues; None: from its beginning.
        in_sweep: whether the run is a job of a sweep that runs now.
    """

    config: Mapping[str, Any]
    settings: Settings
    folder: Path
    data: ImageDataModule
    adapter: Adapter
    evaluation: Any
    loggers: Sequence[LoggerSettings]
    exports: Sequence[Export]
    record: MetricsRecorder
    checkpoints: Checkpoints
    callbacks: Sequence[pl.Callback]
    trainer: Mapping[str, Any]
    micro_batch: int
    checkpoint: Path | None
    in_sweep: bool = False

    @property
    def name(self) -> str:
        """Name of the artifact, used for its files."""
        return self.settings.name or self.data.name

    @property
    def source(self) -> Pretrained:
        return self.adapter.source

    def start(self, shared: SharedBackbone | None = None) -> float | None:
        """Train, write the artifact, evaluate it and write ``metrics.json``; return the optimized metric.

        Args:
            shared: the backbone that this run shares with other runs of the process; None for its own backbone.

        Raises:
            Stopped: Ctrl-C or SIGTERM stopped the run.
            RunFailed: out of memory or a non-finite value.
        """
        if is_global_zero():
            remove_leftovers(self.folder)
        if shared is not None:
            shared.use(self.adapter)
            if self.data.workers is None:
                self.data.workers = 0  # processes of each run would be too many
        cost = CostMeter(None if shared is None else shared.peak_memory)
        with ExitStack() as stack:
            stack.enter_context(self._stopped_outside_of_steps())
            loggers = stack.enter_context(self._opened_loggers())
            trainer = self._training_trainer(shared, cost, loggers)
            if trainer.is_global_zero:
                (self.folder / "metrics.json").unlink(missing_ok=True)
            with self._failures():
                self._fit(trainer)
            metrics = self._finish(trainer, cost, shared, loggers) if trainer.is_global_zero else {}
            wait_for_children(trainer)
        return metrics.get(self.settings.optimized_metric) if self.settings.optimized_metric else None

    def build_trainer(self, **overrides: Any) -> pl.Trainer:
        """Lightning's Trainer with the configured settings and ``overrides``."""
        fixed: dict[str, Any] = {
            "max_epochs": -1,
            "default_root_dir": self.folder,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
        }
        trainer: pl.Trainer = build({**self.trainer, **fixed, **overrides}, self.settings.trust)
        return trainer

    def _training_trainer(self, shared: SharedBackbone | None, cost: CostMeter, loggers: Sequence[Any]) -> pl.Trainer:
        callbacks: list[pl.Callback] = [
            ConfigAgreement(self.config),
            DataSummary(int(self.trainer["max_steps"])),
            TrainingImages(self.folder / TRAINING_IMAGES),
            *(self.record, cost, CrowdedCores(self.folder), ProgressBar(), PinnedAllocation()),
            CudaBackends(self.trainer.get("benchmark")),
            *(*self.callbacks, self.checkpoints),
        ]
        arguments: dict[str, Any] = {}
        if shared is not None:
            callbacks, arguments = shared.callbacks(callbacks, self.checkpoints), shared.trainer_arguments()
        return self.build_trainer(
            callbacks=by_priority(callbacks), logger=list(loggers), plugins=[AtomicIO()], **arguments
        )

    def _fit(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self.checkpoint is not None:
            for damaged in sorted((self.folder / "checkpoints").glob("step*.ckpt")):
                if damaged > self.checkpoint:
                    log.warning("WARNING: %s is damaged; continuing from the checkpoint before it", damaged)
            log.info("resuming at step %d from %s", int(self.checkpoint.stem.removeprefix("step")), self.checkpoint)
        elif trainer.is_global_zero and self.settings.resume:
            log.info("there is no checkpoint yet; starting from the beginning")
        if trainer.is_global_zero:
            device, processes = trainer.strategy.root_device.type, trainer.world_size
            count = f", {processes} processes" if processes > 1 else ""
            log.info(
                "device: %s%s, precision %s", "GPU" if device == "cuda" else device.upper(), count, trainer.precision
            )
        try:
            trainer.fit(self.adapter, datamodule=self.data, ckpt_path=self.checkpoint, weights_only=True)
            self.checkpoints.validate_if_pending(trainer, self.adapter)
        finally:
            self.checkpoints.restore_handlers()
        for samples in (c for c in self.callbacks if isinstance(c, Samples)):
            samples.complete(trainer, self.adapter)
        with self.adapter.final_weights():
            if trainer.is_global_zero:
                self.adapter.artifact(self.folder / "artifact", self.name)
                write_best(self.adapter, self.folder, self.name)
        trainer.strategy.barrier("artifact")
        # Lightning kills the run if another process exits with an error code, so only the first process raises.
        if self.checkpoints.stopped_by is not None and trainer.local_rank == 0:
            wait_for_children(trainer)
            raise Stopped(
                f"stopped at step {trainer.global_step}; checkpoint and artifact are saved; continue it with:"
                f" sdtune train {shell_override('resume', self.folder)}",
                128 + self.checkpoints.stopped_by,
            )

    def _finish(
        self, trainer: pl.Trainer, cost: CostMeter, shared: SharedBackbone | None, loggers: Sequence[Any]
    ) -> dict[str, Any]:
        """Write the model card and the exports, evaluate the artifact, write the metrics, and print the next commands.

        The card is written before the evaluation too, so that a run whose evaluation is interrupted has one.
        ``metrics.json`` is written last: it marks the run as complete. Only the first process calls this.

        Returns:
            The content of ``metrics.json``.
        """
        metrics = _training_metrics(self, trainer, cost)
        _write_card(self, metrics)
        _write_exports(self)
        metrics |= _evaluation_metrics(self, trainer)
        if not self.record.validation:
            metrics["reasons"] = {**metrics.get("reasons", {}), **_no_validation(self.data, trainer.global_step)}
        metrics = finite(metrics)
        for logger in trainer.loggers:
            logger.log_metrics({f"final/{k}": v for k, v in metrics.items() if isinstance(v, int | float)})
        if shared is not None:
            metrics["shared_with"] = shared.count
        _write_card(self, metrics)
        for export in self.exports:
            folder = self.folder / "export" / export.format
            if folder.is_dir():
                export.write_card(
                    find_artifact(self.folder / "artifact", "run"), self.folder / "artifact" / CARD, folder
                )
        for settings, logger in zip(self.loggers, loggers, strict=True):
            settings.keep_artifact(logger, self.folder / "artifact", self.name)
        write_json(self.folder / "metrics.json", metrics)
        lines = [*metrics_table(metrics), *self._best()]
        for line in [] if self.in_sweep else lines:
            log.info(line)
        lines = closing_lines(self.folder, self.name, self.source.commit, self.data)
        for line in lines[:1] if self.in_sweep else lines:  # a sweep prints where its artifacts are when it ends
            log.info(line)
        return metrics

    def _best(self) -> list[str]:
        """Line with the step of the lowest validation loss; none without validation."""
        losses = self.record.validation
        if not losses:
            return []
        step = min(losses, key=lambda step: losses[step])
        return [f"lowest validation loss: {losses[step]:.4f} at step {step} of {max(losses)}"]

    @contextmanager
    def _opened_loggers(self) -> Iterator[list[Any]]:
        """Context manager that opens Lightning's loggers; an exception other than pruning marks the run as failed."""
        opened: list[Any] = []
        with ExitStack() as stack:
            for settings in self.loggers:
                method = type(self.adapter).__name__
                logger = settings.open(self.folder, method, *label_and_sweep(self.folder))
                stack.push(partial(_close, settings, logger))
                logger.log_hyperparams(self.config)
                opened.append(logger)
            yield opened

    @contextmanager
    def _stopped_outside_of_steps(self) -> Iterator[None]:
        """Context manager that handles Ctrl-C, SIGTERM and SIGHUP before and after the training steps.

        Each of them closes the loggers and ends the run. During the steps, ``Checkpoints`` handles them.
        """

        def message() -> str:
            has_checkpoint = any((self.folder / "checkpoints").glob("step*.ckpt"))
            advice = f"continue it with: sdtune train {shell_override('resume', self.folder)}"
            return f"stopped; {advice if has_checkpoint else 'there is no checkpoint yet'}"

        def exit_run(number: int, frame: FrameType | None) -> NoReturn:
            with suppress(OSError):
                os.write(2, f"sdtune: {message()}\n".encode())  # print may be what the signal has interrupted
            raise SystemExit(128 + number)

        is_main = threading.current_thread() is threading.main_thread()
        # KeyboardInterrupt would not do for Ctrl-C: Lightning catches it in fit() and ends the process with code 1.
        defaults = {n: signal.getsignal(n) for n in STOP_SIGNALS if is_main}
        defaults = {n: d for n, d in defaults.items() if d in (signal.SIG_DFL, signal.default_int_handler)}
        for number in defaults:
            signal.signal(number, exit_run)
        try:
            yield
        except KeyboardInterrupt as stop:
            raise Stopped(message(), 128 + signal.SIGINT) from stop
        finally:
            for number, default in defaults.items():
                if signal.getsignal(number) is exit_run:
                    signal.signal(number, default)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Context manager that turns out of memory and non-finite values into :class:`RunFailed` with advice."""
        # data.batch_size is the batch of a step, so more accumulation makes the micro-batch smaller.
        doubled = 2 * int(self.trainer.get("accumulate_grad_batches", 1))
        smaller = f" or trainer.accumulate_grad_batches={doubled}," if self.micro_batch > 1 else ""
        try:
            with _memory_advice(ADVICE["training"].format(smaller=smaller)):
                yield
        except NotFinite as error:
            checkpoints = sorted((self.folder / "checkpoints").glob("step*.ckpt"))
            last = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
            raise RunFailed(f"{error}; {last}", agreed=True) from error


@contextmanager
def _memory_advice(advice: str) -> Iterator[None]:
    """Context manager that turns an out-of-memory error into :class:`RunFailed` with ``advice``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(advice) from error


def _close(
    settings: LoggerSettings,
    logger: Any,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    """Close ``logger`` as an exit callback; an error while closing does not replace the error of the run."""
    try:
        settings.close(logger, kind is not None and not issubclass(kind, Pruned))
    except Exception as closing:
        if error is None:
            raise
        log.error("%s: %s: %s", type(logger).__name__, type(closing).__name__, closing)


def _training_metrics(run: TrainRun, trainer: pl.Trainer, cost: CostMeter) -> dict[str, Any]:
    """The metrics in ``metrics.json`` that only the training can measure."""
    return {
        "steps": trainer.global_step,
        **_validation(run.record),
        **cost.metrics(run.adapter, run.data, run.record, run.folder / "artifact"),
    }


def _evaluation_metrics(run: TrainRun, trainer: pl.Trainer) -> dict[str, Any]:
    """Metrics of the artifact; null with a reason if the evaluation fails for lack of memory, or of a file."""
    if run.evaluation is None:
        return {}
    device = trainer.strategy.root_device  # after fit, Lightning has moved the module to the CPU
    models = RunModels(
        run.source,
        run.folder / "artifact",
        run.name,
        device,
        vae_tiling=run.adapter.vae_tiling,
        # Frozen weights in memory serve as the base model. On a CPU they may have another precision than its own.
        weights=release_backbone(run.adapter) if device.type != "cpu" else None,
    )
    log.info("evaluating the trained model; evaluation=none skips this")
    try:
        metrics: dict[str, Any] = run.evaluation.run(models, run.data, run.folder / "evaluation")
    except (UserError, OSError, RuntimeError, MemoryError, RunFailed) as error:
        # With a shared backbone, the error of a joint batch arrives as its message.
        no_memory = is_out_of_memory(error) or (isinstance(error, RunFailed) and str(error).startswith("out of memory"))
        if isinstance(error, RuntimeError | RunFailed) and not no_memory:
            raise
        reason = "out of memory" if no_memory else str(error)
        command = f"sdtune evaluate {shell_override('run', run.folder)}{' hardware=cpu' if no_memory else ''}"
        log.warning("WARNING: evaluation: %s; the run is complete; measure it with: %s", reason, command)
        return {**dict.fromkeys(run.evaluation.names), "reasons": dict.fromkeys(run.evaluation.names, reason)}
    return metrics


def _validation(record: MetricsRecorder) -> dict[str, Any]:
    """Loss and step of the last validation, which is the final step if the interval divides the number of steps."""
    step = max(record.validation, default=None)
    return {"validation_loss": None if step is None else record.validation[step], "validation_step": step}


def _no_validation(data: ImageDataModule, steps: int) -> dict[str, str]:
    """Validation metric -> the reason that it is null."""
    reason = (
        f"no validation in {steps} steps: trainer.val_check_interval is larger"
        if data.held_out
        else "no held-out images: set data.hold_out or data.validation_path for data=folder, or data.validation_images"
        " for a pocket data set"
    )
    return dict.fromkeys(("validation_loss", "validation_step", "seconds_to_best"), reason)


def _write_card(run: TrainRun, metrics: Mapping[str, Any]) -> None:
    """Write the model card of the artifact."""
    source, data = run.source, run.data
    backbone = source.path if not Path(source.path).expanduser().exists() else Path(source.path).name
    facts: dict[str, Any] = {
        "family": source.facts.family.name,
        "backbone": backbone,
        "hash": source.hash(),
        "trigger": data.trigger_words(),
        "images": len(data.train),
        "captions": list(itertools.islice(data.all_prompts(), 3)),
        "side": data.side,
    }
    artifact = find_artifact(run.folder / "artifact", "run")
    grid = run.folder / "samples" / "before_after.png"
    write_card(run.folder / "artifact", artifact, run.config, facts, metrics, grid)


def _write_exports(run: TrainRun) -> None:
    """Write the artifact in the configured export formats; a failed export is logged and does not fail the run."""
    for export in run.exports:
        try:
            artifact = find_artifact(run.folder / "artifact", "run")
            export_folder = run.folder / "export" / export.format
            for written in export.write(artifact, run.source, export_folder, last_samples(run.folder)):
                log.info("export: %s", written)
            export.write_card(artifact, run.folder / "artifact" / CARD, export_folder)
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            command = f"sdtune export {shell_override('run', run.folder)} format={export.format}"
            log.error("exports: %s: %s; the run is complete; export it with: %s", export.format, error, command)
