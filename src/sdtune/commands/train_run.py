"""``TrainRun``: one training run, from its checked config to its final metrics."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import pytorch_lightning as pl

from sdtune.backbone import Pretrained
from sdtune.callbacks.best_artifact import write_best
from sdtune.callbacks.checkpoints import AtomicIO, Checkpoints, last_checkpoint
from sdtune.callbacks.config_agreement import ConfigAgreement
from sdtune.callbacks.cost import CostMeter
from sdtune.callbacks.crowded_cores import CrowdedCores
from sdtune.callbacks.data_summary import DataSummary
from sdtune.callbacks.kept_memory import KeptMemory
from sdtune.callbacks.metrics_recorder import MetricsRecorder, NotFinite
from sdtune.callbacks.order import by_priority
from sdtune.callbacks.progress_bar import ProgressBar
from sdtune.callbacks.samples import Samples
from sdtune.commands.describe import after
from sdtune.config.build import build
from sdtune.config.settings import Settings
from sdtune.data import ImageDataModule
from sdtune.errors import Pruned, RunFailed, Stopped, UserError
from sdtune.exporting import Export, find_artifact, write_card
from sdtune.files import write_json
from sdtune.hardware.child_processes import wait_for_children
from sdtune.hardware.out_of_memory import ADVICE, is_out_of_memory
from sdtune.loggers import LoggerSettings
from sdtune.methods.base import Adapter
from sdtune.quoting import shell_override
from sdtune.runs.layout import CARD
from sdtune.runs.metrics import finite
from sdtune.runs.names import label_and_sweep
from sdtune.shared_backbone.session import SharedBackbone

log = logging.getLogger("sdtune")


@dataclass(frozen=True)
class TrainRun:
    """A checked training run and all its parts. No weights are loaded before :meth:`start`.

    Args:
        config: the resolved config, which is recorded and compared, never read.
        settings: the run's own settings.
        folder: where it writes.
        data, adapter, evaluation, loggers, exports: built from the config; the evaluation is None where there is none.
        record, checkpoints, callbacks: likewise; ``callbacks`` are those that the config chooses.
        trainer: the node of Lightning's Trainer.
        micro_batch: samples per micro-batch and process.
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

    @property
    def name(self) -> str:
        """Names the artifact's files."""
        return self.settings.name or self.data.name

    @property
    def source(self) -> Pretrained:
        return self.adapter.source

    def start(self, shared: SharedBackbone | None = None) -> float | None:
        """Train, write the artifact, evaluate, and write ``metrics.json`` last; gives the optimised metric.

        Args:
            shared: the backbone that it shares with other runs of this process, if it does.
        """
        (self.folder / "metrics.json").unlink(missing_ok=True)
        if shared is not None:
            shared.use(self.adapter)
        cost = CostMeter(None if shared is None else shared.peak_memory)
        with ExitStack() as stack:
            stack.enter_context(self._stopped_outside_of_steps())
            loggers = stack.enter_context(self._opened_loggers())
            trainer = self._training_trainer(shared, cost, loggers)
            with self._failures():
                self._fit(trainer)
            with _memory_advice(ADVICE["after training"].format(resume=shell_override("resume", self.folder))):
                metrics = _final_metrics(self, trainer, cost)
            if trainer.is_global_zero:
                if shared is not None:
                    metrics["shared_with"] = shared.count
                self._finish(loggers, metrics)
            wait_for_children(trainer)
        return metrics.get(self.settings.optimized_metric) if self.settings.optimized_metric else None

    def build_trainer(self, **own: Any) -> pl.Trainer:
        """Lightning's Trainer with the config's settings and ``own`` ones."""
        fixed: dict[str, Any] = {
            "max_epochs": -1,
            "default_root_dir": self.folder,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
        }
        trainer: pl.Trainer = build({**self.trainer, **fixed, **own}, self.settings.trust)
        return trainer

    def _training_trainer(self, shared: SharedBackbone | None, cost: CostMeter, loggers: Sequence[Any]) -> pl.Trainer:
        own: list[pl.Callback] = [
            ConfigAgreement(self.config),
            DataSummary(int(self.trainer["max_steps"])),
            *(self.record, cost, CrowdedCores(self.folder), ProgressBar(), KeptMemory()),
            *(*self.callbacks, self.checkpoints),
        ]
        arguments: dict[str, Any] = {}
        if shared is not None:
            own, arguments = shared.callbacks(own, self.checkpoints), shared.trainer_arguments()
        return self.build_trainer(callbacks=by_priority(own), logger=list(loggers), plugins=[AtomicIO()], **arguments)

    def _fit(self, trainer: pl.Trainer) -> None:
        start = last_checkpoint(self.folder) if self.settings.resume else None
        if trainer.is_global_zero and start:
            log.info("resuming at step %d from %s", int(start.stem.removeprefix("step")), start)
        try:
            trainer.fit(self.adapter, datamodule=self.data, ckpt_path=start, weights_only=True)
        finally:
            self.checkpoints.restore_handlers()
        for samples in (c for c in self.callbacks if isinstance(c, Samples)):
            samples.complete(trainer, self.adapter)
        with self.adapter.final_weights():
            if trainer.is_global_zero:
                self.adapter.artifact(self.folder / "artifact", self.name)
                write_best(self.adapter, self.folder, self.name)
        trainer.strategy.barrier("artifact")
        # Lightning kills a run of which any process but the first ends with a code: the first one speaks for all.
        if self.checkpoints.stopped_by is not None and trainer.local_rank == 0:
            wait_for_children(trainer)
            raise Stopped(
                f"stopped at step {trainer.global_step}; checkpoint and artifact are saved. Go on with: sdtune train"
                f" {shell_override('resume', self.folder)}",
                128 + self.checkpoints.stopped_by,
            )

    def _finish(self, loggers: Sequence[Any], metrics: dict[str, Any]) -> None:
        """On the first process: the card, uploads, ``metrics.json``, exports, and what to do next."""
        _write_card(self, metrics)
        for settings, logger in zip(self.loggers, loggers, strict=True):
            settings.keep_artifact(logger, self.folder / "artifact", self.name)
        write_json(self.folder / "metrics.json", metrics)
        _write_exports(self)
        for line in after(self.folder, self.name, self.source, self.data):
            log.info(line)

    @contextmanager
    def _opened_loggers(self) -> Iterator[list[Any]]:
        """Lightning's loggers; closed as failed where an exception ends the run, unless a search prunes it."""
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
        """Before and after the training, Ctrl-C and SIGTERM close the loggers and end the run.

        While it trains, Checkpoints listens to both.
        """

        def line() -> str:
            kept = any((self.folder / "checkpoints").glob("step*.ckpt"))
            again = f"sdtune train {shell_override('resume', self.folder)} goes on from its last checkpoint"
            return f"stopped; {again if kept else 'there is no checkpoint yet'}"

        def leave(number: int, frame: FrameType | None) -> NoReturn:
            print(f"sdtune: {line()}", file=sys.stderr)
            raise SystemExit(128 + number)

        before = signal.getsignal(signal.SIGTERM)
        own = before == signal.SIG_DFL and threading.current_thread() is threading.main_thread()
        if own:
            signal.signal(signal.SIGTERM, leave)
        try:
            yield
        except KeyboardInterrupt as stop:
            raise Stopped(line(), 128 + signal.SIGINT) from stop
        finally:
            if own and signal.getsignal(signal.SIGTERM) is leave:
                signal.signal(signal.SIGTERM, before)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """What ends a training by itself, as a :class:`RunFailed` that says what to do."""
        # data.batch_size counts the whole step, so the micro-batch shrinks as the accumulation grows.
        doubled = 2 * int(self.trainer.get("accumulate_grad_batches", 1))
        smaller = f" or trainer.accumulate_grad_batches={doubled}," if self.micro_batch > 1 else ""
        try:
            with _memory_advice(ADVICE["training"].format(smaller=smaller)):
                yield
        except NotFinite as error:
            kept = sorted((self.folder / "checkpoints").glob("step*.ckpt"))
            last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            raise RunFailed(f"{error}; {last}", agreed=True) from error


@contextmanager
def _memory_advice(advice: str) -> Iterator[None]:
    """Out of memory as a :class:`RunFailed` with ``advice``."""
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
    """Close ``logger`` as an ``ExitStack`` leaves it; where an error ends the run, it counts and not one of closing."""
    try:
        settings.close(logger, kind is not None and not issubclass(kind, Pruned))
    except Exception as closing:
        if error is None:
            raise
        log.error("%s: %s: %s", type(logger).__name__, type(closing).__name__, closing)


def _final_metrics(run: TrainRun, trainer: pl.Trainer, cost: CostMeter) -> dict[str, Any]:
    """The content of ``metrics.json``; empty on every process but the first."""
    if not trainer.is_global_zero:
        return {}
    artifact = run.folder / "artifact"
    metrics: dict[str, Any] = {
        "steps": trainer.global_step,
        **_validation(run.record),
        **cost.metrics(run.adapter, run.data, run.record, artifact),
    }
    if run.evaluation is not None:
        device = trainer.strategy.root_device  # after fit, Lightning has moved the module to the CPU
        log.info("drawing and measuring what was trained; evaluation=none leaves this out")
        metrics |= run.evaluation.run(run.source, run.data, artifact, run.name, device, run.folder / "evaluation")
    if not run.record.validation:
        metrics["reasons"] = {**metrics.get("reasons", {}), **_no_validation(run.data, trainer.global_step)}
    metrics = finite(metrics)
    for logger in trainer.loggers:
        logger.log_metrics({f"final/{k}": v for k, v in metrics.items() if isinstance(v, int | float)})
    return metrics


def _validation(record: MetricsRecorder) -> dict[str, Any]:
    """The last validation's loss, and its step: the artifact's own, where the interval divides the run."""
    step = max(record.validation, default=None)
    return {"validation_loss": None if step is None else record.validation[step], "validation_step": step}


def _no_validation(data: ImageDataModule, steps: int) -> dict[str, str]:
    """Why the metrics of the validation are null."""
    why = (
        f"no validation before step {steps}: trainer.val_check_interval is larger"
        if data.held_out
        else "no image is held out: data.hold_out or data.validation_path of data=folder,"
        " data.validation_images of pocket's"
    )
    return dict.fromkeys(("validation_loss", "validation_step", "seconds_to_best"), why)


def _write_card(run: TrainRun, metrics: Mapping[str, Any]) -> None:
    """The artifact's model card."""
    source, data = run.source, run.data
    local = source.path if not Path(source.path).expanduser().exists() else Path(source.path).name
    facts: dict[str, Any] = {
        "family": source.facts.family,
        "backbone": local,
        "hash": source.hash(),
        "trigger": data.keep,
        "images": len(data.train),
        "captions": data.captions(),
        "side": data.resolution,
    }
    artifact = find_artifact(run.folder / "artifact", "run")
    grid = run.folder / "samples" / "before_after.png"
    write_card(run.folder / "artifact", artifact, run.config, facts, metrics, grid)


def _write_exports(run: TrainRun) -> None:
    """The artifact in the further forms that are asked for. One that fails does not undo a run that is complete."""
    for export in run.exports:
        try:
            artifact = find_artifact(run.folder / "artifact", "run")
            place = run.folder / "export" / export.format
            for written in export.write(artifact, run.source, place):
                log.info("export: %s", written)
            export.write_card(artifact, run.folder / "artifact" / CARD, place)
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            again = f"sdtune export {shell_override('run', run.folder)} format={export.format}"
            log.error("exports: %s: %s; the run is complete, and %s makes it", export.format, error, again)
