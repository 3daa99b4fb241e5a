"""Checks before a training run: reject invalid settings before weights are loaded or a file is written."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from pytorch_lightning.callbacks import Callback

from sdtune.backbone import Facts, Pretrained
from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.callbacks.samples import Samples, Snapshots
from sdtune.callbacks.validation_set import NOTHING_HELD_OUT
from sdtune.commands.train_run import TrainRun
from sdtune.config import hardware
from sdtune.config.build import build
from sdtune.config.model import CALLBACK_ARGUMENTS, check_model
from sdtune.config.schema import check_node, check_value
from sdtune.config.settings import Settings, check_name, read_settings
from sdtune.config.sources import build_data, check_data
from sdtune.config.targets import resolve
from sdtune.config.trainer import check_trainer, trainer_arguments, with_epochs_as_steps
from sdtune.data import ImageDataModule
from sdtune.errors import UserError
from sdtune.exporting import FORMATS, Artifact, Export
from sdtune.exporting.artifact import Kind
from sdtune.loggers import LoggerSettings, OtherLogger
from sdtune.methods.base import Adapter, check_trainable
from sdtune.paths import cache_folder
from sdtune.runs.metrics import OF_TRAINING
from sdtune.suggest import suggestion


def build_evaluation_data(config: dict[str, Any]) -> ImageDataModule:
    """Check the backbone, data and evaluation of ``config``, for a command that only measures a run's artifact.

    Raises:
        UserError: for the first setting that is wrong.
    """
    settings = read_settings(config)
    check_node(config["backbone"], "backbone", settings.trust)
    check_data(config["data"], settings.trust)
    check_node(config["evaluation"], "evaluation", settings.trust, ())
    source = build(config["backbone"], settings.trust)
    data = _open_data(config, source.facts, settings)
    build(config["evaluation"], settings.trust).check(data, source.facts)
    source.check()
    return data


def _exports(config: dict[str, Any], kind: Kind) -> list[Export]:
    """The checked entries of ``exports``, for an artifact of ``kind``."""
    check_value(config["exports"], list[dict[str, Any]], "exports")
    exports: list[Export] = []
    for number, entry in enumerate(config["exports"]):
        hints = get_type_hints(Export, include_extras=True)
        if unknown_key := next((key for key in entry if key not in hints), None):
            raise UserError(
                f"unknown setting{suggestion(str(unknown_key), list(hints))}", key=f"exports[{number}].{unknown_key}"
            )
        for key, value in entry.items():
            check_value(value, hints[key], f"exports[{number}].{key}")
        if "format" not in entry:
            raise UserError(
                "format is missing", key=f"exports[{number}]", remedy=f"use {{format: {FORMATS[kind][-1]}}}"
            )
        if any(other.format == entry["format"] for other in exports):
            raise UserError(
                f"{entry['format']} is already listed", key=f"exports[{number}].format", remedy="remove the duplicate"
            )
        exports.append(Export(**entry))
        try:
            exports[-1].check(Artifact(kind, Path(), ""))
        except UserError as error:
            raise UserError(f"exports[{number}].{error}") from error
    return exports


def _open_data(config: dict[str, Any], facts: Facts, settings: Settings) -> ImageDataModule:
    data = build_data(config["data"], settings.trust, settings.seed)
    data.open(facts.side, facts.factor)
    return data


def check_run(
    config: dict[str, Any], folder: Path, checkpoint: Path | None = None, typed: Sequence[str] = ()
) -> TrainRun:
    """Build a :class:`TrainRun` from ``config`` and check all its settings; loads no weights.

    Args:
        config: the resolved config.
        folder: output folder of the run; it need not exist.
        checkpoint: checkpoint from which the run continues.
        typed: overrides of the command line.

    Raises:
        UserError: for the first setting that is wrong.
    """
    settings = read_settings(config)
    trust = settings.trust
    cache_folder()
    _check_nodes(config, trust)
    source: Pretrained = build(config["backbone"], trust)
    data = _open_data(config, source.facts, settings)
    trainer = with_epochs_as_steps(config["trainer"], lambda: data.order().steps_per_epoch, typed)
    config = {**config, "trainer": trainer}
    loggers = _loggers(config, trust)
    accumulation = int(config["trainer"].get("accumulate_grad_batches", 1))
    micro_batch = hardware.micro_batch(config["hardware"], data.batch_size, accumulation)
    # Constructors of methods reject combinations of settings that do not fit.
    adapter = _adapter(config, settings, source)
    check_name(settings.name or data.name)
    check_trainable(adapter, data)
    exports = _exports(config, adapter.artifact_kind)
    evaluation = build(config["evaluation"], trust) if config["evaluation"] else None
    _check_metrics(evaluation, data, source.facts, settings.optimized_metric)
    source.check()
    record = MetricsRecorder(folder)
    checkpoint_arguments = {"folder": folder / "checkpoints", "record": record}
    return TrainRun(
        config=config,
        settings=settings,
        folder=folder,
        data=data,
        adapter=adapter,
        evaluation=evaluation,
        loggers=loggers,
        exports=exports,
        record=record,
        checkpoints=build(config["checkpoint"], trust, checkpoint_arguments),
        callbacks=_callbacks(config, settings, folder, data, source.facts, record),
        trainer=trainer_arguments(config),
        micro_batch=micro_batch,
        checkpoint=checkpoint,
    )


def _check_nodes(config: dict[str, Any], trust: tuple[str, ...]) -> None:
    """Check each config group against the constructor that its ``_target_`` names."""
    check_model(config, trust)
    check_data(config["data"], trust)
    check_node(config["evaluation"], "evaluation", trust, ())
    for key, node in config["logger"].items():
        # Loggers of other packages need not accept save_dir.
        check_node(node, f"logger.{key}", trust, ("save_dir",))
    for key, node in config["callbacks"].items():
        check_node(node, f"callbacks.{key}", trust, CALLBACK_ARGUMENTS)
    check_node(config["checkpoint"], "checkpoint", trust, ("folder", "record"))
    check_trainer(config, trust)


def _adapter(config: dict[str, Any], settings: Settings, source: Pretrained) -> Adapter:
    """The method with its objective, optimizer, learning rate schedule and hardware switches."""
    parts = {group: build(config[group], settings.trust) for group in ("objective", "optimizer", "lr_schedule")}
    switches = {key: config["hardware"].get(key, False) for key in hardware.SWITCHES}
    top_level = {"new_tokens": settings.new_tokens, "tokens_lr": settings.tokens_lr, "seed": settings.seed}
    adapter: Adapter = build(config["method"], settings.trust, {"backbone": source, **parts, **switches, **top_level})
    return adapter


def _loggers(config: dict[str, Any], trust: tuple[str, ...]) -> list[LoggerSettings]:
    loggers: list[LoggerSettings] = []
    for key, node in config["logger"].items():
        if not node:
            continue
        logger_class = resolve(str(node["_target_"]), f"logger.{key}", trust)
        if inspect.isclass(logger_class) and issubclass(logger_class, LoggerSettings):
            loggers.append(build(node, trust))
            loggers[-1].check()
        else:
            loggers.append(OtherLogger(partial(build, node, trust)))
    return loggers


def _callbacks(
    config: dict[str, Any],
    settings: Settings,
    folder: Path,
    data: ImageDataModule,
    facts: Facts,
    record: MetricsRecorder,
) -> list[Callback]:
    """The configured callbacks, in the order of the config."""
    arguments = {"folder": folder / "samples", "record": record, "run": folder, "trial": settings.trial}
    callbacks: list[Callback] = []
    for key, node in config["callbacks"].items():
        if not node:
            continue
        callbacks.append(build(node, settings.trust, arguments))
        if getattr(callbacks[-1], "needs_validation_set", False) and not data.held_out:
            raise UserError(NOTHING_HELD_OUT, key=f"callbacks.{key}")
        if isinstance(callbacks[-1], Samples):
            callbacks[-1].sampling.check(facts, f"callbacks.{key}.sampling")
    if settings.save_every:
        samples = next((c for c in callbacks if isinstance(c, Samples)), None)
        callbacks.append(Snapshots(folder, settings.name or data.name, settings.save_every, samples))
    return callbacks


def _check_metrics(evaluation: Any, data: ImageDataModule, facts: Facts, optimized_metric: str | None) -> None:
    """Check that the evaluation fits the data, and that ``optimized_metric`` is a metric of the run."""
    if evaluation is not None:
        evaluation.check(data, facts)
    known_metrics = [*OF_TRAINING, *getattr(evaluation, "names", ())]
    # An evaluation of another package may not list its metrics before it runs.
    all_listed = evaluation is None or hasattr(evaluation, "names")
    if all_listed and optimized_metric and optimized_metric.removeprefix("base_") not in known_metrics:
        raise UserError(
            f"unknown metric {optimized_metric}{suggestion(optimized_metric, known_metrics)}", key="optimized_metric"
        )
