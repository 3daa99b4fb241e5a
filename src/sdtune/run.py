"""A training run, put together: check, build, fit, leave behind."""

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

from sdtune import hardware, report_lines
from sdtune.callbacks.bar import Bar
from sdtune.callbacks.best import write_best
from sdtune.callbacks.checkpoints import AtomicIO, Checkpoints, last_checkpoint
from sdtune.callbacks.cost import Cost
from sdtune.callbacks.ema import EMA
from sdtune.callbacks.record import NotFinite, Record
from sdtune.callbacks.same_config import SameConfig
from sdtune.callbacks.samples import Samples
from sdtune.callbacks.snapshots import Snapshots
from sdtune.checks import Settings, check_run, exports, plain, settings, trainer_arguments
from sdtune.children import wait_for_children
from sdtune.data import PictureData
from sdtune.errors import Pruned, RunFailed, Stopped
from sdtune.exporting import find, write_card
from sdtune.exporting.card import CARD
from sdtune.figures import finite
from sdtune.files import write_json
from sdtune.instantiate import build
from sdtune.loggers import close, keep_artifact
from sdtune.methods.base import Adapter
from sdtune.resume import check_unchanged
from sdtune.sharing.groups import alone
from sdtune.sharing.run import Sharing
from sdtune.sweeps import names

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
            raise ValueError(
                f"trainer.max_steps: {container['trainer']['max_steps']} lies before step {done}, which {folder} has"
                " reached; give a larger one"
            )
        if (folder / "metrics.json").exists() and done >= container["trainer"]["max_steps"]:
            raise ValueError(
                f"resume: the run in {folder} is complete at step {done}; give a larger trainer.max_steps= to extend it"
            )
    elif first and ((folder / "metrics.csv").exists() or any(folder.glob("checkpoints/*"))):
        raise ValueError(f"hydra.run.dir: {folder} already holds a run; resume={folder} goes on with it")
    shares = sharing is not None or _will_share(container)
    if shares:
        hardware.check(container["hardware"])
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
) -> tuple[Record, Checkpoints, list[pl.Callback]]:
    record = Record(folder)
    checkpoints: Checkpoints = build(
        config["checkpoint"], top.trust, {"folder": folder / "checkpoints", "record": record}
    )
    offer = {"folder": folder / "samples", "record": record, "run": folder, "trial": top.trial}
    chosen: list[pl.Callback] = [build(node, top.trust, offer) for node in config["callbacks"].values() if node]
    samples = next((c for c in chosen if isinstance(c, Samples)), None)
    if top.save_every:
        chosen.append(Snapshots(folder, name, top.save_every, samples))
    # The average must have moved before anything reads it, and figures must be down before a checkpoint is.
    chosen.sort(key=lambda callback: not isinstance(callback, EMA))
    averages = [c for c in chosen if isinstance(c, EMA)]
    own = [SameConfig(config), *averages, record, Cost(sharing.measured if sharing else None), Bar()]
    return record, checkpoints, [*own, *chosen[len(averages) :], checkpoints]


def build_adapter(config: dict[str, Any], sharing: Sharing | None = None) -> Adapter:
    """The method of a checked ``config``, with everything that it is given."""
    top = settings(config)
    parts = {group: build(config[group], top.trust) for group in ("backbone", "objective", "optimizer", "lr_schedule")}
    if sharing is not None:
        parts["backbone"] = sharing.source(parts["backbone"])
    switches = {key: config["hardware"].get(key, False) for key in hardware.SWITCHES}
    own = {"new_tokens": top.new_tokens, "tokens_lr": top.tokens_lr, "seed": top.seed}
    adapter: Adapter = build(config["method"], top.trust, {**parts, **switches, **own})
    return adapter


def execute(config: dict[str, Any], data: PictureData, folder: Path, sharing: Sharing | None = None) -> float | None:
    """Train, write the artifact, evaluate, and write ``metrics.json`` last."""
    top = settings(config)
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
        figures = _figures(trainer, adapter, data, record, folder, name, config)
        if trainer.is_global_zero:
            if sharing is not None:
                figures["shared_with"] = sharing.count
            _write_card(adapter, data, folder, config, figures)
            keep_artifact(loggers, folder / "artifact", name)
            write_json(folder / "metrics.json", figures)
            _export(adapter, folder, config)
            for line in report_lines.after(folder, name, adapter.source, data):
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
    return figures.get(top.optimized_metric) if top.optimized_metric else None


def _write_card(
    adapter: Adapter, data: PictureData, folder: Path, config: dict[str, Any], figures: dict[str, Any]
) -> None:
    """The artifact's model card."""
    source, artifact = adapter.source, find(folder / "artifact", "run")
    local = source.path if not Path(source.path).expanduser().exists() else Path(source.path).name
    facts: dict[str, Any] = {
        "family": source.facts.family,
        "backbone": local,
        "hash": source.hash(),
        "trigger": data.keep,
    }
    facts |= {"pictures": len(data.train), "captions": data.captions(), "side": data.resolution}
    write_card(folder / "artifact", artifact, config, facts, figures, folder / "samples" / "before_after.png")


def _export(adapter: Adapter, folder: Path, config: dict[str, Any]) -> None:
    """The artifact in the further forms that are asked for. One that fails does not undo a run that is complete."""
    for export in exports(config, adapter.leaves):
        try:
            artifact = find(folder / "artifact", "run")
            place = folder / "export" / export.format
            for written in export.write(artifact, adapter.source, place):
                log.info("export: %s", written)
            export.write_card(artifact, folder / "artifact" / CARD[0], place)
        except (ValueError, OSError, RuntimeError) as error:
            log.error(
                "exports: %s: %s; the run is complete, and sdtune export run=%s format=%s makes it",
                export.format,
                error,
                folder,
                export.format,
            )


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Out, before training or after it, with the loggers closed on the way."""
    print("sdtune: stopped; sdtune train resume=RUN goes on from the last checkpoint, if there is one", file=sys.stderr)
    raise SystemExit(128 + number)


def _train(
    trainer: pl.Trainer,
    adapter: Adapter,
    data: PictureData,
    start: Path | None,
    folder: Path,
    name: str,
    top: Settings,
    checkpoints: Checkpoints,
) -> None:
    if trainer.is_global_zero:
        for line in report_lines.before(data, adapter.source, trainer.max_steps, adapter.new_tokens):
            log.info(line)
        if start:
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
            f" sdtune train resume={folder}",
            128 + checkpoints.stopped_by,
        )


def _validation(record: Record) -> dict[str, Any]:
    """The last validation's loss, and its step: the artifact's own, where the interval divides the run."""
    step = max(record.validation, default=None)
    return {"validation_loss": None if step is None else record.validation[step], "validation_step": step}


def _figures(
    trainer: pl.Trainer,
    adapter: Adapter,
    data: PictureData,
    record: Record,
    folder: Path,
    name: str,
    config: dict[str, Any],
) -> dict[str, Any]:
    if not trainer.is_global_zero:
        return {}
    cost = next(c for c in trainer.callbacks if isinstance(c, Cost))  # type: ignore[attr-defined]
    figures: dict[str, Any] = {
        "steps": trainer.global_step,
        **_validation(record),
        **cost.figures(adapter, data, record, folder / "artifact"),
    }
    if config["evaluation"]:
        trust = settings(config).trust
        device = trainer.strategy.root_device  # after fit, Lightning has moved the module to the CPU
        evaluation = build(config["evaluation"], trust)
        log.info("drawing and measuring what was trained; evaluation=none leaves this out")
        figures |= evaluation.run(adapter.source, data, folder / "artifact", name, device, folder / "evaluation")
    if not record.validation:
        why = (
            f"no validation before step {trainer.global_step}: trainer.val_check_interval is larger"
            if data.held_out
            else "no picture is held out: data.hold_out or data.validation_path of data=folder,"
            " data.validation_pictures of pocket's"
        )
        reasons = {"validation_loss": why, "validation_step": why, "seconds_to_best": why}
        figures["reasons"] = {**figures.get("reasons", {}), **reasons}
    figures = finite(figures)
    for logger in trainer.loggers:
        logger.log_metrics({f"final/{k}": v for k, v in figures.items() if isinstance(v, int | float)})
    return figures
