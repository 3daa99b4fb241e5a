"""A training run, put together: check, build, fit, leave behind."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytorch_lightning as pl
import torch
from annotated_types import Ge, Gt
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import StringConstraints

from sdtune import hardware, report_lines
from sdtune.callbacks.bar import Bar
from sdtune.callbacks.checkpoints import AtomicIO, Checkpoints, last_checkpoint
from sdtune.callbacks.cost import Cost
from sdtune.callbacks.ema import EMA
from sdtune.callbacks.record import NotFinite, Record
from sdtune.callbacks.samples import Samples
from sdtune.callbacks.snapshots import Snapshots
from sdtune.children import wait_for_children
from sdtune.data import PictureData
from sdtune.files import write_json
from sdtune.instantiate import build, check, check_value
from sdtune.launch import RunFailed, Stopped
from sdtune.methods.base import Adapter
from sdtune.resume import check_unchanged

log = logging.getLogger("sdtune")


@dataclass(frozen=True)
class Settings:
    """The run's own settings, at the top of the config.

    Args:
        name: names files; the data's name if None.
        seed: decides every draw of the run.
        save_every: optimizer steps between intermediate artifacts with their sample row.
        resume: the folder of the run that goes on.
        trust: further packages that ``_target_`` may name.
        optimized_metric: the figure that ``train`` returns to a sweeper.
    """

    name: Annotated[str, StringConstraints(pattern=r"^\w[\w .+-]*$")] | None = None
    seed: Annotated[int, Ge(0)] = 0
    save_every: Annotated[int, Ge(1)] | None = None
    resume: str | None = None
    trust: tuple[str, ...] = ()
    optimized_metric: str | None = None


_COMMON = ("backbone", "objective", "optimizer", "lr_schedule", "seed")


def plain(config: DictConfig) -> dict[str, Any]:
    """A resolved plain container; ValueError for a mandatory value that is missing."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        missing = sorted(OmegaConf.missing_keys(own))
        if missing:
            raise ValueError(f"{missing[0]} is missing: give {missing[0]}=...")
        container = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def settings(config: dict[str, Any]) -> Settings:
    """The top-level settings, checked."""
    hints = get_type_hints(Settings.__init__, include_extras=True)
    values = {key: config[key] for key in hints if config.get(key) is not None}
    for key, value in values.items():
        check_value(value, hints[key], key)
    if values.get("name") == "pytorch_lora_weights":
        raise ValueError("name: pytorch_lora_weights is the name of the file for diffusers; choose another")
    return Settings(**{**values, "trust": tuple(values.get("trust", ()))})


_TRAINER_RANGES: dict[str, Any] = {
    "max_steps": Annotated[int, Ge(1)],
    "accumulate_grad_batches": Annotated[int, Ge(1)],
    "log_every_n_steps": Annotated[int, Ge(1)],
    "val_check_interval": Annotated[int, Ge(1)],
    "gradient_clip_val": Annotated[float, Gt(0)] | None,
}
_OURS = (
    "max_epochs",
    "callbacks",
    "logger",
    "plugins",
    "default_root_dir",
    "enable_progress_bar",
    "enable_model_summary",
    "enable_checkpointing",
    "use_distributed_sampler",
    "gradient_clip_algorithm",
)
"""Trainer arguments that the run sets itself."""


def trainer_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Lightning's Trainer arguments of the groups ``trainer`` and ``hardware``, each ``auto`` decided."""
    merged = {**config["trainer"], **config["hardware"]}
    kind = str(merged.get("accelerator", "auto"))
    merged["precision"] = hardware.precision(str(merged.get("precision", "auto")), kind)
    merged["accelerator"] = hardware.accelerator(kind)
    return merged


def _check_trainer(config: dict[str, Any], trust: tuple[str, ...]) -> None:
    hardware.check(config["hardware"])
    for key, value in config["trainer"].items():
        if key in _OURS:
            raise ValueError(f"trainer.{key}: the run sets this itself; leave it out")
        if key in _TRAINER_RANGES:
            check_value(value, _TRAINER_RANGES[key], f"trainer.{key}")
    check(trainer_arguments(config), "trainer", trust)
    if _processes(config) > 1 and HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        # Lightning would start the other processes with the sweep's own command line, each a sweep again.
        raise ValueError("hardware.devices: a sweep's jobs have one device each for now; start such runs one by one")


def _processes(config: dict[str, Any]) -> int:
    devices = config["hardware"].get("devices", 1)
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return count * int(config["hardware"].get("num_nodes", 1))


def _check_optimizer(node: dict[str, Any], trust: tuple[str, ...]) -> None:
    check(node, "optimizer", trust)
    check_value(node.get("lr"), Annotated[float, Gt(0)] | None, "optimizer.lr")
    try:
        # torch's annotations hold no ranges; its constructors check them, and want something to optimise.
        build(node, trust)([torch.nn.Parameter(torch.zeros(1))])
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from error


def check_run(config: dict[str, Any]) -> PictureData:
    """Every check that needs no weights; returns the data, read."""
    top = settings(config)
    trust = top.trust
    check(config["backbone"], "backbone", trust)
    check(config["method"], "method", trust, _COMMON)
    for group in ("objective", "lr_schedule"):
        check(config[group], group, trust)
    _check_optimizer(config["optimizer"], trust)
    check(config["data"], "data", trust, ("seed",))
    check(config["evaluation"], "evaluation", trust, ())
    for group, given in (("logger", ("save_dir",)), ("callbacks", ("folder", "record"))):
        for key, node in config[group].items():
            check(node, f"{group}.{key}", trust, given)
    check(config["checkpoint"], "checkpoint", trust, ("folder", "record"))
    _check_trainer(config, trust)
    source = build(config["backbone"], trust)
    facts = source.facts
    data: PictureData = build(config["data"], trust, {"seed": top.seed})
    data.open(facts.side, facts.factor)
    accumulation = int(config["trainer"].get("accumulate_grad_batches", 1))
    parts = accumulation * _processes(config)
    if data.batch_size % parts:
        raise ValueError(
            f"data.batch_size: {data.batch_size} samples a step cannot be shared out over {_processes(config)}"
            f" device(s) x {accumulation} accumulation steps; choose a multiple of {parts}"
        )
    # A constructor that refuses a pair of settings does so here.
    build(config["method"], trust, {"backbone": source}).check_data(data)
    if config["evaluation"]:
        build(config["evaluation"], trust).check(data, facts)
    return data


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
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
    data = check_run(container)
    return lambda composed: execute(plain(composed), data, folder)


def _callbacks(
    config: dict[str, Any], folder: Path, name: str, top: Settings
) -> tuple[Record, Checkpoints, list[pl.Callback]]:
    record = Record(folder)
    checkpoints: Checkpoints = build(
        config["checkpoint"], top.trust, {"folder": folder / "checkpoints", "record": record}
    )
    offer = {"folder": folder / "samples", "record": record}
    chosen: list[pl.Callback] = [build(node, top.trust, offer) for node in config["callbacks"].values() if node]
    samples = next((c for c in chosen if isinstance(c, Samples)), None)
    if top.save_every:
        chosen.append(Snapshots(folder, name, top.save_every, samples))
    # The average must have moved before anything reads it, and figures must be down before a checkpoint is.
    chosen.sort(key=lambda callback: not isinstance(callback, EMA))
    averages = [c for c in chosen if isinstance(c, EMA)]
    return record, checkpoints, [*averages, record, Cost(), Bar(), *chosen[len(averages) :], checkpoints]


def execute(config: dict[str, Any], data: PictureData, folder: Path) -> float | None:
    """Train, write the artifact, evaluate, and write ``metrics.json`` last."""
    top = settings(config)
    name = top.name or data.name
    (folder / "metrics.json").unlink(missing_ok=True)
    source = build(config["backbone"], top.trust)
    adapter: Adapter = build(
        config["method"],
        top.trust,
        {
            "backbone": source,
            "objective": build(config["objective"], top.trust),
            "optimizer": build(config["optimizer"], top.trust),
            "lr_schedule": build(config["lr_schedule"], top.trust),
            "seed": top.seed,
        },
    )
    record, checkpoints, callbacks = _callbacks(config, folder, name, top)
    start = last_checkpoint(folder) if top.resume else None
    loggers: list[Any] = []
    failed = True
    try:
        for node in config["logger"].values():
            if node:
                loggers.append(build(node, top.trust, {"save_dir": str(folder)}))
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
        trainer: pl.Trainer = build(trainer_arguments(config), top.trust, given)
        _train(trainer, adapter, data, start, folder, name, top, checkpoints)
        figures = _figures(trainer, adapter, data, record, folder, name, config)
        wait_for_children(trainer)
        failed = False
    except NotFinite as error:
        kept = sorted((folder / "checkpoints").glob("step*.ckpt"))
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise RunFailed(f"{error}; {last}") from error
    finally:
        _close(loggers, failed)
    return figures.get(top.optimized_metric) if top.optimized_metric else None


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
        for line in report_lines.before(data, adapter.source, trainer):
            log.info(line)
        if start:
            log.info("resuming at step %d from %s", int(start.stem.removeprefix("step")), start)
    try:
        trainer.fit(adapter, datamodule=data, ckpt_path=start, weights_only=True)
    finally:
        checkpoints.restore_handlers()
    with adapter.final_weights():
        if trainer.is_global_zero:
            adapter.artifact(folder / "artifact", name)
    trainer.strategy.barrier("artifact")
    # Lightning kills a run of which any process but the first ends with a code: the first one speaks for all.
    if checkpoints.stopped_by is not None and trainer.local_rank == 0:
        wait_for_children(trainer)
        raise Stopped(
            f"stopped at step {trainer.global_step}; checkpoint and artifact are saved. Go on with:"
            f" sdtune train resume={folder}",
            128 + checkpoints.stopped_by,
        )


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
        "validation_loss": record.validation.get(max(record.validation, default=-1)),
        **cost.figures(adapter, data, record, folder / "artifact"),
    }
    if config["evaluation"]:
        trust = settings(config).trust
        device = trainer.strategy.root_device  # after fit, Lightning has moved the module to the CPU
        evaluation = build(config["evaluation"], trust)
        figures |= evaluation.run(adapter.source, data, folder / "artifact", name, device, folder / "evaluation")
    for logger in trainer.loggers:
        logger.log_metrics({f"final/{k}": v for k, v in figures.items() if isinstance(v, int | float)})
    write_json(folder / "metrics.json", figures)
    for line in report_lines.after(folder, name, adapter.source, data):
        log.info(line)
    return figures


def _close(loggers: list[Any], failed: bool) -> None:
    """Without this the next job of a sweep would write into this one's run."""
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if type(logger).__name__ == "WandbLogger":
            import wandb

            wandb.finish(exit_code=1 if failed else 0)
