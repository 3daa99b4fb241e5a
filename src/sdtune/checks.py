"""Everything that can be refused before a training loads weights or writes a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
from annotated_types import Ge, Gt
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import StringConstraints

from sdtune import hardware
from sdtune.backbone import Facts
from sdtune.backbone.tokens import NewToken
from sdtune.callbacks.held_out import NOTHING_HELD_OUT
from sdtune.data import PictureData
from sdtune.exporting import FORMATS, Artifact, Export
from sdtune.exporting.artifact import Kind
from sdtune.figures import OF_TRAINING
from sdtune.instantiate import build, check, check_value, resolve
from sdtune.jobs import without_hydra
from sdtune.loggers import require_account
from sdtune.suggest import suggestion


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
        new_tokens: words to be learned beside what the method trains.
        tokens_lr: the learning rate of their vectors; the optimizer's if None.
        trial: the number of the job's Optuna trial, which the sweeper gives.
    """

    name: Annotated[str, StringConstraints(pattern=r"^\w[\w .+-]*$")] | None = None
    seed: Annotated[int, Ge(0)] = 0
    save_every: Annotated[int, Ge(1)] | None = None
    resume: str | None = None
    trust: tuple[str, ...] = ()
    optimized_metric: str | None = None
    new_tokens: tuple[NewToken, ...] = ()
    tokens_lr: Annotated[float, Gt(0)] | None = None
    trial: Annotated[int, Ge(0)] | None = None


_COMMON = ("backbone", "objective", "optimizer", "lr_schedule", "new_tokens", "tokens_lr", *hardware.SWITCHES, "seed")


def plain(config: DictConfig) -> dict[str, Any]:
    """A resolved plain container; ValueError for a mandatory value that is missing."""
    own = without_hydra(config)
    try:
        missing = sorted(OmegaConf.missing_keys(own))
        if missing:
            raise ValueError(f"{missing[0]} is missing: give {missing[0]}=...")
        container = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    assert isinstance(container, dict)
    named = {str(key): value for key, value in container.items()}
    if named.get("evaluation") and "_target_" not in named["evaluation"]:
        named["evaluation"] = {}  # evaluation=none behind a recipe that sets details of its own
    return named


def kept_config(run: Path) -> dict[str, Any]:
    """The resolved config of the finished ``run``; ValueError for a folder that holds none."""
    kept = run / ".hydra" / "config.yaml"
    if not kept.is_file():
        raise ValueError(f"run: {run} holds no run (no .hydra/config.yaml); name the folder of one")
    if not any((run / "artifact").glob("*")):
        raise ValueError(f"run: {run}/artifact is empty; the run has not finished, sdtune train resume={run} goes on")
    loaded = OmegaConf.load(kept)
    assert isinstance(loaded, DictConfig)
    return plain(loaded)


def settings(config: dict[str, Any]) -> Settings:
    """The top-level settings, checked."""
    hints = get_type_hints(Settings.__init__, include_extras=True)
    values = {key: config[key] for key in hints if config.get(key) is not None}
    for key, value in values.items():
        check_value(value, hints[key], key)
    if values.get("name") == "pytorch_lora_weights":
        raise ValueError("name: pytorch_lora_weights is the name of the file for diffusers; choose another")
    tokens = tuple(NewToken(**token) for token in values.get("new_tokens", ()))
    return Settings(**{**values, "trust": tuple(values.get("trust", ())), "new_tokens": tokens})


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
    for key in hardware.SWITCHES:
        merged.pop(key, None)
    if isinstance(merged.get("val_check_interval"), int):
        # Lightning counts micro-batches; a run that is shorter than the interval is measured at its end.
        every = min(merged["val_check_interval"], merged.get("max_steps") or merged["val_check_interval"])
        merged["val_check_interval"] = every * int(merged.get("accumulate_grad_batches", 1))
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


def _check_optimizer(node: dict[str, Any], trust: tuple[str, ...]) -> None:
    check(node, "optimizer", trust)
    check_value(node.get("lr"), Annotated[float, Gt(0)] | None, "optimizer.lr")
    try:
        # torch's annotations hold no ranges; its constructors check them, and want something to optimise.
        build(node, trust)([torch.nn.Parameter(torch.zeros(1))])
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from error


_PRODIGY = "prodigyopt.Prodigy"
_OWN_FACTOR = 0.1  # below it, a rate is another optimizer's


def _check_prodigy(config: dict[str, Any]) -> None:
    """Its rate is a factor on the step size that it finds, the same for all that it trains."""
    if config["optimizer"]["_target_"] != _PRODIGY:
        return
    rate = config["optimizer"].get("lr", 1.0)
    if rate < _OWN_FACTOR:
        raise ValueError(
            f"optimizer.lr: {rate:g} is a factor on the step size that Prodigy finds by itself; give optimizer.lr=1.0"
            " behind the recipe"
        )
    rates = {"tokens_lr": config.get("tokens_lr")}
    rates |= {f"method.{key}": value for key, value in config["method"].items() if key.endswith("_lr")}
    own = [key for key, value in rates.items() if value is not None]
    if own:
        raise ValueError(
            f"{own[0]}: Prodigy has one rate for all that it trains; give {own[0]}=null, or another optimizer"
        )


def check_model(config: dict[str, Any], trust: tuple[str, ...]) -> None:
    """The checks of what is trained and how."""
    check(config["backbone"], "backbone", trust)
    check(config["method"], "method", trust, _COMMON)
    for group in ("objective", "lr_schedule"):
        check(config[group], group, trust)
    _check_optimizer(config["optimizer"], trust)
    _check_prodigy(config)


def check_measured(config: dict[str, Any]) -> PictureData:
    """Of :func:`check_run` what measuring a run's artifact needs: no method, optimizer or logger."""
    top = settings(config)
    check(config["backbone"], "backbone", top.trust)
    check(config["data"], "data", top.trust, ("seed",))
    check(config["evaluation"], "evaluation", top.trust, ())
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
            raise ValueError(f"exports[{number}].{odd}: there is no such setting{suggestion(str(odd), list(hints))}")
        for key, value in entry.items():
            check_value(value, hints[key], f"exports[{number}].{key}")
        if "format" not in entry:
            raise ValueError(f"exports[{number}]: format is missing; write {{format: {FORMATS[kind][-1]}}}")
        if any(other.format == entry["format"] for other in made):
            raise ValueError(
                f"exports[{number}]: {entry['format']} stands twice; sdtune export makes further ones later"
            )
        made.append(Export(**entry))
        try:
            made[-1].check(Artifact(kind, Path(), ""))
        except ValueError as error:
            raise ValueError(f"exports[{number}].{error}") from error
    return made


def _opened(config: dict[str, Any], facts: Facts, top: Settings) -> PictureData:
    data: PictureData = build(config["data"], top.trust, {"seed": top.seed})
    data.open(facts.side, facts.factor)
    return data


def check_run(config: dict[str, Any]) -> PictureData:
    """Every check that needs no weights; returns the data, read."""
    top = settings(config)
    trust = top.trust
    check_model(config, trust)
    check(config["data"], "data", trust, ("seed",))
    check(config["evaluation"], "evaluation", trust, ())
    for group, given in (
        ("logger", ("save_dir", "method", "label", "sweep")),
        ("callbacks", ("folder", "record", "run", "trial")),
    ):
        for key, node in config[group].items():
            check(node, f"{group}.{key}", trust, given)
    check(config["checkpoint"], "checkpoint", trust, ("folder", "record"))
    _check_trainer(config, trust)
    source = build(config["backbone"], trust)
    facts = source.facts
    data = _opened(config, facts, top)
    for key, node in config["callbacks"].items():
        kind = resolve(node["_target_"], "callbacks", trust) if node else None
        if getattr(kind, "needs_held_out", False) and not data.held_out:
            raise ValueError(f"callbacks.{key}: {NOTHING_HELD_OUT}")
    for node in config["logger"].values():
        if node and str(node["_target_"]).endswith("wandb_logger"):
            require_account(bool(node.get("offline")))
    accumulation = int(config["trainer"].get("accumulate_grad_batches", 1))
    hardware.micro_batch(config["hardware"], data.batch_size, accumulation)
    # A constructor that refuses a pair of settings does so here.
    method = build(config["method"], trust, {"backbone": source, "new_tokens": top.new_tokens})
    method.check_against(data)
    exports(config, method.leaves)
    evaluation = build(config["evaluation"], trust) if config["evaluation"] else None
    if evaluation is not None:
        evaluation.check(data, facts)
    known = [*OF_TRAINING, *getattr(evaluation, "names", ())]
    # Of a stranger's evaluation nobody knows the names before it has run.
    sure = evaluation is None or hasattr(evaluation, "names")
    if sure and top.optimized_metric and top.optimized_metric.removeprefix("base_") not in known:
        raise ValueError(
            f"optimized_metric: {top.optimized_metric}: there is no such figure"
            f"{suggestion(top.optimized_metric, known)}; there are {', '.join(known)}"
        )
    source.check()
    return data
