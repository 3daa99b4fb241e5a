"""Checks of a training: everything that can be refused before weights are loaded or a file is written."""

from __future__ import annotations

import inspect
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
from sdtune.config.model import check_model
from sdtune.config.schema import check_node, check_value
from sdtune.config.settings import Settings, read_settings
from sdtune.config.targets import resolve
from sdtune.config.trainer import check_trainer, trainer_arguments
from sdtune.data import ImageDataModule
from sdtune.errors import UserError
from sdtune.exporting import FORMATS, Artifact, Export
from sdtune.exporting.artifact import Kind
from sdtune.loggers import LoggerSettings, OtherLogger
from sdtune.methods.base import Adapter, check_trainable
from sdtune.runs.metrics import OF_TRAINING
from sdtune.suggest import suggestion


def check_measured(config: dict[str, Any]) -> ImageDataModule:
    """Of :func:`check_run` what measuring a run's artifact needs: no method, optimizer or logger."""
    top = read_settings(config)
    check_node(config["backbone"], "backbone", top.trust)
    check_node(config["data"], "data", top.trust, ("seed",))
    check_node(config["evaluation"], "evaluation", top.trust, ())
    source = build(config["backbone"], top.trust)
    data = _opened(config, source.facts, top)
    build(config["evaluation"], top.trust).check(data, source.facts)
    source.check()
    return data


def _exports(config: dict[str, Any], kind: Kind) -> list[Export]:
    """The forms that the run's artifact, of ``kind``, is to be written in at its end."""
    check_value(config["exports"], list[dict[str, Any]], "exports")
    made: list[Export] = []
    for number, entry in enumerate(config["exports"]):
        hints = get_type_hints(Export, include_extras=True)
        if odd := next((key for key in entry if key not in hints), None):
            raise UserError(
                f"there is no such setting{suggestion(str(odd), list(hints))}", key=f"exports[{number}].{odd}"
            )
        for key, value in entry.items():
            check_value(value, hints[key], f"exports[{number}].{key}")
        if "format" not in entry:
            raise UserError(
                "format is missing", key=f"exports[{number}]", remedy=f"write {{format: {FORMATS[kind][-1]}}}"
            )
        if any(other.format == entry["format"] for other in made):
            raise UserError(
                f"{entry['format']} stands twice; sdtune export makes further ones later", key=f"exports[{number}]"
            )
        made.append(Export(**entry))
        try:
            made[-1].check(Artifact(kind, Path(), ""))
        except UserError as error:
            raise UserError(f"exports[{number}].{error}") from error
    return made


def _opened(config: dict[str, Any], facts: Facts, top: Settings) -> ImageDataModule:
    data: ImageDataModule = build(config["data"], top.trust, {"seed": top.seed})
    data.open(facts.side, facts.factor)
    return data


def check_run(config: dict[str, Any], folder: Path) -> TrainRun:
    """Every check that needs no weights, and the run that is made of what was checked.

    Args:
        config: resolved.
        folder: where the run is to write.

    Raises:
        UserError: for the first thing that is wrong.
    """
    settings = read_settings(config)
    trust = settings.trust
    _check_nodes(config, trust)
    source: Pretrained = build(config["backbone"], trust)
    data = _opened(config, source.facts, settings)
    loggers = _loggers(config, trust)
    accumulation = int(config["trainer"].get("accumulate_grad_batches", 1))
    micro_batch = hardware.micro_batch(config["hardware"], data.batch_size, accumulation)
    # A constructor that refuses a pair of settings does so here.
    adapter = _adapter(config, settings, source)
    check_trainable(adapter, data)
    made = _exports(config, adapter.artifact_kind)
    evaluation = build(config["evaluation"], trust) if config["evaluation"] else None
    _check_metrics(evaluation, data, source.facts, settings.optimized_metric)
    source.check()
    record = MetricsRecorder(folder)
    offer = {"folder": folder / "checkpoints", "record": record}
    return TrainRun(
        config=config,
        settings=settings,
        folder=folder,
        data=data,
        adapter=adapter,
        evaluation=evaluation,
        loggers=loggers,
        exports=made,
        record=record,
        checkpoints=build(config["checkpoint"], trust, offer),
        callbacks=_callbacks(config, settings, folder, data, record),
        trainer=trainer_arguments(config),
        micro_batch=micro_batch,
    )


def _check_nodes(config: dict[str, Any], trust: tuple[str, ...]) -> None:
    """Check each config group against the constructor that its ``_target_`` names."""
    check_model(config, trust)
    check_node(config["data"], "data", trust, ("seed",))
    check_node(config["evaluation"], "evaluation", trust, ())
    for key, node in config["logger"].items():
        # A logger of another package may take none of these.
        check_node(node, f"logger.{key}", trust, ("save_dir",))
    for key, node in config["callbacks"].items():
        check_node(node, f"callbacks.{key}", trust, ("folder", "record", "run", "trial"))
    check_node(config["checkpoint"], "checkpoint", trust, ("folder", "record"))
    check_trainer(config, trust)


def _adapter(config: dict[str, Any], settings: Settings, source: Pretrained) -> Adapter:
    """The method, with everything that it is given."""
    parts = {group: build(config[group], settings.trust) for group in ("objective", "optimizer", "lr_schedule")}
    switches = {key: config["hardware"].get(key, False) for key in hardware.SWITCHES}
    own = {"new_tokens": settings.new_tokens, "tokens_lr": settings.tokens_lr, "seed": settings.seed}
    adapter: Adapter = build(config["method"], settings.trust, {"backbone": source, **parts, **switches, **own})
    return adapter


def _loggers(config: dict[str, Any], trust: tuple[str, ...]) -> list[LoggerSettings]:
    found: list[LoggerSettings] = []
    for key, node in config["logger"].items():
        if not node:
            continue
        kind = resolve(str(node["_target_"]), f"logger.{key}", trust)
        if inspect.isclass(kind) and issubclass(kind, LoggerSettings):
            found.append(build(node, trust))
            found[-1].check()
        else:
            found.append(OtherLogger(partial(build, node, trust)))
    return found


def _callbacks(
    config: dict[str, Any], settings: Settings, folder: Path, data: ImageDataModule, record: MetricsRecorder
) -> list[Callback]:
    """The callbacks that the config chooses, in its order."""
    offer = {"folder": folder / "samples", "record": record, "run": folder, "trial": settings.trial}
    chosen: list[Callback] = []
    for key, node in config["callbacks"].items():
        if not node:
            continue
        chosen.append(build(node, settings.trust, offer))
        if getattr(chosen[-1], "needs_validation_set", False) and not data.held_out:
            raise UserError(NOTHING_HELD_OUT, key=f"callbacks.{key}")
    if settings.save_every:
        samples = next((c for c in chosen if isinstance(c, Samples)), None)
        chosen.append(Snapshots(folder, settings.name or data.name, settings.save_every, samples))
    return chosen


def _check_metrics(evaluation: Any, data: ImageDataModule, facts: Facts, wanted: str | None) -> None:
    """Check that the evaluation fits the data, and that ``optimized_metric`` is a metric of the run."""
    if evaluation is not None:
        evaluation.check(data, facts)
    known = [*OF_TRAINING, *getattr(evaluation, "names", ())]
    # Of a stranger's evaluation nobody knows the names before it has run.
    sure = evaluation is None or hasattr(evaluation, "names")
    if sure and wanted and wanted.removeprefix("base_") not in known:
        raise UserError(
            f"{wanted}: there is no such metric{suggestion(wanted, known)}; there are {', '.join(known)}",
            key="optimized_metric",
        )
