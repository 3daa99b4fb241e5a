"""``sdtune train``: check, build, fit, write the artifact, evaluate."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sdtune.callbacks.best_artifact import write_best
from sdtune.callbacks.checkpoints import AtomicIO, Checkpoints, last_checkpoint
from sdtune.callbacks.config_agreement import ConfigAgreement
from sdtune.callbacks.cost import CostMeter
from sdtune.callbacks.data_summary import DataSummary
from sdtune.callbacks.ema import EMA
from sdtune.callbacks.metrics_recorder import MetricsRecorder, NotFinite
from sdtune.callbacks.progress_bar import ProgressBar
from sdtune.callbacks.samples import Samples, Snapshots
from sdtune.commands.checks import check_run
from sdtune.commands.describe import after
from sdtune.commands.finish import describe_artifact, export_artifact, measure_run
from sdtune.config import hardware
from sdtune.config.build import build
from sdtune.config.settings import Settings, plain, read_settings
from sdtune.config.trainer import trainer_arguments
from sdtune.data import ImageDataModule
from sdtune.errors import STOPPED, Pruned, RunFailed, Stopped, UserError
from sdtune.files import write_json
from sdtune.hardware.child_processes import wait_for_children
from sdtune.loggers import close, keep_artifact
from sdtune.methods.base import Adapter
from sdtune.quoting import shell_override
from sdtune.runs.compare import check_unchanged
from sdtune.runs.names import label_and_sweep as names
from sdtune.shared_backbone.compatibility import alone
from sdtune.shared_backbone.session import Sharing

log = logging.getLogger("sdtune")


def prepare(config: DictConfig, folder: Path, sharing: Sharing | None = None) -> Callable[[DictConfig], Any]:
    """Check ``config`` and ``folder``, and give the function that runs it."""
    container = plain(config)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if container.get("resume"):
        checkpoint = last_checkpoint(folder)
        check_unchanged(container, folder)
        done = int(checkpoint.stem.removeprefix("step"))
        if done > container["trainer"]["max_steps"]:
            raise UserError(
                f"{container['trainer']['max_steps']} lies before step {done}, which {folder} has reached",
                key="trainer.max_steps",
                remedy="give a larger one",
            )
        if (folder / "metrics.json").exists() and done >= container["trainer"]["max_steps"]:
            raise UserError(
                f"the run in {folder} is complete at step {done}",
                key="resume",
                remedy="give a larger trainer.max_steps= to extend it",
            )
    elif first and ((folder / "metrics.csv").exists() or any(folder.glob("checkpoints/*"))):
        again = shell_override("resume", folder)
        raise UserError(f"{folder} already holds a run; {again} goes on with it", key="hydra.run.dir")
    shares = sharing is not None or _will_share(container)
    if shares:
        hardware.check_hardware(container["hardware"])
        hardware.check_indices(container["hardware"])
    data = check_run(_placed(container, shares))
    return lambda composed: execute(_placed(plain(composed), sharing is not None), data, folder, sharing)


def _placed(config: dict[str, Any], shared: bool) -> dict[str, Any]:
    return {**config, "hardware": hardware.on_one(config["hardware"])} if shared else config


def _will_share(config: dict[str, Any]) -> bool:
    """Whether a job that is checked before its sweep starts will go through a backbone with others."""
    launcher = str(HydraConfig.get().launcher._target_) if HydraConfig.initialized() else ""
    return launcher.endswith(".SharedBackboneLauncher") and alone(config) is None


def _callbacks(
    config: dict[str, Any], folder: Path, name: str, top: Settings, sharing: Sharing | None
) -> tuple[MetricsRecorder, Checkpoints, list[pl.Callback]]:
    record = MetricsRecorder(folder)
    checkpoints: Checkpoints = build(
        config["checkpoint"], top.trust, {"folder": folder / "checkpoints", "record": record}
    )
    offer = {"folder": folder / "samples", "record": record, "run": folder, "trial": top.trial}
    chosen: list[pl.Callback] = [build(node, top.trust, offer) for node in config["callbacks"].values() if node]
    samples = next((c for c in chosen if isinstance(c, Samples)), None)
    if top.save_every:
        chosen.append(Snapshots(folder, name, top.save_every, samples))
    # The average must have moved before anything reads it, and metrics must be written before a checkpoint is.
    chosen.sort(key=lambda callback: not isinstance(callback, EMA))
    averages = [c for c in chosen if isinstance(c, EMA)]
    own = [
        ConfigAgreement(config),
        DataSummary(config["trainer"]["max_steps"]),
        *averages,
        record,
        CostMeter(sharing.measured if sharing else None),
        ProgressBar(),
    ]
    return record, checkpoints, [*own, *chosen[len(averages) :], checkpoints]


def build_adapter(config: dict[str, Any], sharing: Sharing | None = None) -> Adapter:
    """The method of a checked ``config``, with everything that it is given."""
    top = read_settings(config)
    parts = {group: build(config[group], top.trust) for group in ("backbone", "objective", "optimizer", "lr_schedule")}
    if sharing is not None:
        parts["backbone"] = sharing.source(parts["backbone"])
    switches = {key: config["hardware"].get(key, False) for key in hardware.SWITCHES}
    own = {"new_tokens": top.new_tokens, "tokens_lr": top.tokens_lr, "seed": top.seed}
    adapter: Adapter = build(config["method"], top.trust, {**parts, **switches, **own})
    return adapter


def execute(
    config: dict[str, Any], data: ImageDataModule, folder: Path, sharing: Sharing | None = None
) -> float | None:
    """Train, write the artifact, evaluate, and write ``metrics.json`` last."""
    top = read_settings(config)
    name = top.name or data.name
    (folder / "metrics.json").unlink(missing_ok=True)
    adapter = build_adapter(config, sharing)
    record, checkpoints, callbacks = _callbacks(config, folder, name, top, sharing)
    if sharing is not None:
        callbacks = sharing.callbacks(callbacks, checkpoints)
    start = last_checkpoint(folder) if top.resume else None
    loggers: list[Any] = []
    failed = True
    before = signal.getsignal(signal.SIGTERM)
    try:
        if before == signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _leave)  # while it trains, Checkpoints listens
        for node in config["logger"].values():
            if node:
                offered = {"save_dir": str(folder), "method": type(adapter).__name__, **names(folder)}
                loggers.append(build(node, top.trust, offered))
                loggers[-1].log_hyperparams(config)
        given = {
            "max_epochs": -1,
            "callbacks": callbacks,
            "logger": loggers,
            "plugins": [AtomicIO()],
            "default_root_dir": folder,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
        }
        alone = sharing.alone() if sharing is not None else {}
        trainer: pl.Trainer = build({**trainer_arguments(config), **alone}, top.trust, given)
        _train(trainer, adapter, data, start, folder, name, top, checkpoints)
        metrics = measure_run(trainer, adapter, data, record, folder, name, config)
        if trainer.is_global_zero:
            if sharing is not None:
                metrics["shared_with"] = sharing.count
            describe_artifact(adapter, data, folder, config, metrics)
            keep_artifact(loggers, folder / "artifact", name)
            write_json(folder / "metrics.json", metrics)
            export_artifact(adapter, folder, config)
            for line in after(folder, name, adapter.source, data):
                log.info(line)
        wait_for_children(trainer)
        failed = False
    except Pruned:
        failed = False
        raise
    except NotFinite as error:
        kept = sorted((folder / "checkpoints").glob("step*.ckpt"))
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise RunFailed(f"{error}; {last}", agreed=True) from error
    except torch.OutOfMemoryError as error:
        accumulation = int(config["trainer"].get("accumulate_grad_batches", 1))
        several = hardware.micro_batch(config["hardware"], data.batch_size, accumulation) > 1
        # data.batch_size counts the whole step, so the micro-batch shrinks as the accumulation grows.
        smaller = f" or trainer.accumulate_grad_batches={2 * accumulation}," if several else ""
        raise RunFailed(
            f"out of memory on the device: give hardware=gpu_12gb,{smaller} or a smaller data.resolution; sdtune plan"
            " fits=GIB with the same settings says what would do"
        ) from error
    finally:
        close(loggers, failed)
        if signal.getsignal(signal.SIGTERM) is _leave:
            signal.signal(signal.SIGTERM, before)
    return metrics.get(top.optimized_metric) if top.optimized_metric else None


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Out, before training or after it, with the loggers closed on the way."""
    print(f"sdtune: {STOPPED}", file=sys.stderr)
    raise SystemExit(128 + number)


def _train(
    trainer: pl.Trainer,
    adapter: Adapter,
    data: ImageDataModule,
    start: Path | None,
    folder: Path,
    name: str,
    top: Settings,
    checkpoints: Checkpoints,
) -> None:
    if trainer.is_global_zero and start:
        log.info("resuming at step %d from %s", int(start.stem.removeprefix("step")), start)
    try:
        trainer.fit(adapter, datamodule=data, ckpt_path=start, weights_only=True)
    finally:
        checkpoints.restore_handlers()
    for samples in (c for c in trainer.callbacks if isinstance(c, Samples)):  # type: ignore[attr-defined]
        samples.complete(trainer, adapter)
    with adapter.final_weights():
        if trainer.is_global_zero:
            adapter.artifact(folder / "artifact", name)
            write_best(adapter, folder, name)
    trainer.strategy.barrier("artifact")
    # Lightning kills a run of which any process but the first ends with a code: the first one speaks for all.
    if checkpoints.stopped_by is not None and trainer.local_rank == 0:
        wait_for_children(trainer)
        raise Stopped(
            f"stopped at step {trainer.global_step}; checkpoint and artifact are saved. Go on with:"
            f" sdtune train {shell_override('resume', folder)}",
            128 + checkpoints.stopped_by,
        )
