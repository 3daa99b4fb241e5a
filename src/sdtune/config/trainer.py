"""Lightning's Trainer arguments: the config groups ``trainer`` and ``hardware``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from annotated_types import Ge, Gt

from sdtune.config import hardware
from sdtune.config.schema import check_node, check_value
from sdtune.errors import UserError
from sdtune.hardware.devices import accelerator
from sdtune.hardware.precision import precision

_TRAINER_RANGES: dict[str, Any] = {
    "max_steps": Annotated[int, Ge(1)],
    "epochs": Annotated[int, Ge(1)] | None,
    "accumulate_grad_batches": Annotated[int, Ge(1)],
    "log_every_n_steps": Annotated[int, Ge(1)],
    "val_check_interval": Annotated[int, Ge(1)],
    "gradient_clip_val": Annotated[float, Gt(0)] | None,
}
_SET_BY_SDTUNE = (
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
"""Trainer arguments that sdtune sets."""


def trainer_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Lightning's Trainer arguments from the groups ``trainer`` and ``hardware``, with each ``auto`` resolved."""
    merged = {**config["trainer"], **config["hardware"]}
    for key in (*hardware.NON_LIGHTNING_KEYS, "epochs"):
        merged.pop(key, None)
    if isinstance(merged.get("val_check_interval"), int):
        # Lightning counts micro-batches; a run that is shorter than the interval is validated at its end.
        interval = min(merged["val_check_interval"], merged.get("max_steps") or merged["val_check_interval"])
        merged["val_check_interval"] = interval * int(merged.get("accumulate_grad_batches", 1))
    kind = str(merged.get("accelerator", "auto"))
    merged["precision"] = precision(str(merged.get("precision", "auto")), kind)
    merged["accelerator"] = accelerator(kind)
    return merged


def with_epochs_as_steps(
    trainer: dict[str, Any], steps_per_epoch: Callable[[], int], typed: Sequence[str]
) -> dict[str, Any]:
    """Compute ``max_steps`` from ``epochs``; returns ``trainer`` unchanged if ``epochs`` is null.

    ``max_steps`` of the command line takes precedence over ``epochs`` of a recipe.

    Args:
        trainer: the config group.
        steps_per_epoch: returns the optimizer steps in which each sample is used at least once.
        typed: overrides of the command line.

    Raises:
        UserError: the command line has both.
    """
    epochs = trainer.get("epochs")
    if epochs is None:
        return trainer
    keys = {text.lstrip("+").partition("=")[0] for text in typed}
    if {"trainer.max_steps", "trainer.epochs"} <= keys:
        raise UserError("given together with trainer.max_steps", key="trainer.epochs", remedy="remove one of the two")
    if "trainer.max_steps" in keys:
        return {**trainer, "epochs": None}
    return {**trainer, "max_steps": epochs * steps_per_epoch()}


def check_trainer(config: dict[str, Any], trust: tuple[str, ...]) -> None:
    hardware.check_hardware(config["hardware"])
    for key, value in config["trainer"].items():
        if key in _SET_BY_SDTUNE:
            raise UserError("set by sdtune", key=f"trainer.{key}", remedy="remove this override")
        if key in _TRAINER_RANGES:
            check_value(value, _TRAINER_RANGES[key], f"trainer.{key}")
    check_node(trainer_arguments(config), "trainer", trust)
