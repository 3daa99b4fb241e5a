"""Checks of a training: everything that can be refused before weights are loaded or a file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

from sdtune.backbone import Facts
from sdtune.callbacks.validation_set import NOTHING_HELD_OUT
from sdtune.config import hardware
from sdtune.config.build import build
from sdtune.config.model import check_model
from sdtune.config.schema import check_node, check_value
from sdtune.config.settings import Settings, read_settings
from sdtune.config.targets import resolve
from sdtune.config.trainer import check_trainer
from sdtune.data import ImageDataModule
from sdtune.errors import UserError
from sdtune.exporting import FORMATS, Artifact, Export
from sdtune.exporting.artifact import Kind
from sdtune.loggers import require_account
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


def exports(config: dict[str, Any], kind: Kind) -> list[Export]:
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


def check_run(config: dict[str, Any]) -> ImageDataModule:
    """Every check that needs no weights; returns the data, read."""
    top = read_settings(config)
    trust = top.trust
    check_model(config, trust)
    check_node(config["data"], "data", trust, ("seed",))
    check_node(config["evaluation"], "evaluation", trust, ())
    for group, given in (
        ("logger", ("save_dir", "method", "label", "sweep")),
        ("callbacks", ("folder", "record", "run", "trial")),
    ):
        for key, node in config[group].items():
            check_node(node, f"{group}.{key}", trust, given)
    check_node(config["checkpoint"], "checkpoint", trust, ("folder", "record"))
    check_trainer(config, trust)
    source = build(config["backbone"], trust)
    facts = source.facts
    data = _opened(config, facts, top)
    for key, node in config["callbacks"].items():
        kind = resolve(node["_target_"], "callbacks", trust) if node else None
        if getattr(kind, "needs_validation_set", False) and not data.held_out:
            raise UserError(NOTHING_HELD_OUT, key=f"callbacks.{key}")
    for node in config["logger"].values():
        if node and str(node["_target_"]).endswith("wandb_logger"):
            require_account(bool(node.get("offline")))
    accumulation = int(config["trainer"].get("accumulate_grad_batches", 1))
    hardware.micro_batch(config["hardware"], data.batch_size, accumulation)
    # A constructor that refuses a pair of settings does so here.
    method = build(config["method"], trust, {"backbone": source, "new_tokens": top.new_tokens})
    method.check_against(data)
    exports(config, method.artifact_kind)
    evaluation = build(config["evaluation"], trust) if config["evaluation"] else None
    if evaluation is not None:
        evaluation.check(data, facts)
    known = [*OF_TRAINING, *getattr(evaluation, "names", ())]
    # Of a stranger's evaluation nobody knows the names before it has run.
    sure = evaluation is None or hasattr(evaluation, "names")
    if sure and top.optimized_metric and top.optimized_metric.removeprefix("base_") not in known:
        raise UserError(
            f"{top.optimized_metric}: there is no such"
            f" metric{suggestion(top.optimized_metric, known)}; there are {', '.join(known)}",
            key="optimized_metric",
        )
    source.check()
    return data
