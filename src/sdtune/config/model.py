"""The config groups ``method``, ``backbone``, ``objective``, ``optimizer`` and ``lr_schedule``."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

import torch
from annotated_types import Gt

from sdtune.config import hardware
from sdtune.config.build import build
from sdtune.config.schema import check_node, check_value
from sdtune.config.targets import resolve
from sdtune.errors import UserError

_PASSED = ("backbone", "objective", "optimizer", "lr_schedule", "new_tokens", "tokens_lr", *hardware.SWITCHES, "seed")

CALLBACK_ARGUMENTS = ("folder", "record", "run", "trial")
"""Arguments of callbacks that a training passes."""


def _check_optimizer(node: dict[str, Any], trust: tuple[str, ...]) -> None:
    check_node(node, "optimizer", trust)
    kind = resolve(str(node["_target_"]), "optimizer", trust)
    annotated = inspect.get_annotations(kind.__init__ if inspect.isclass(kind) else kind)
    for key, value in node.items():
        # Some optimizers have no annotations, so check_node() accepts any value for their arguments.
        if key not in annotated and not isinstance(value, bool | int | float | str | list | None):
            raise UserError(f"got {value!r}", key=f"optimizer.{key}", remedy="expected a number, text or a list")
    check_value(node.get("lr"), Annotated[float, Gt(0)], "optimizer.lr")
    try:
        # torch's annotations have no ranges; its constructors check them and need a parameter to optimize.
        build(node, trust)([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        values = ", ".join(f"{key}={value}" for key, value in node.items() if not key.startswith("_"))
        raise UserError(
            f"{error} ({values})", key="optimizer", remedy="correct the settings of the optimizer"
        ) from error


_MIN_PRODIGY_LR = 0.1  # a smaller rate was meant for another optimizer


def _check_prodigy(config: dict[str, Any], trust: tuple[str, ...]) -> None:
    """Check that Prodigy gets a factor near 1 as its learning rate, and the same rate for all parameters."""
    prodigyopt = sys.modules.get("prodigyopt")  # imported if the config names one of its classes
    kind = resolve(str(config["optimizer"]["_target_"]), "optimizer", trust)
    if prodigyopt is None or not issubclass(kind, prodigyopt.Prodigy):
        return
    rate = config["optimizer"].get("lr", 1.0)
    if rate < _MIN_PRODIGY_LR:
        raise UserError(
            f"Prodigy estimates the step size and expects lr=1.0, got {rate:g}",
            key="optimizer.lr",
            remedy="add optimizer.lr=1.0 after the recipe",
        )
    rates = {"tokens_lr": config.get("tokens_lr")}
    rates |= {f"method.{key}": value for key, value in config["method"].items() if key.endswith("_lr")}
    separate_rates = [key for key, value in rates.items() if value is not None]
    if separate_rates:
        raise UserError(
            "Prodigy uses one learning rate for all parameters",
            key=separate_rates[0],
            remedy=f"set {separate_rates[0]}=null or use another optimizer",
        )


def _check_tokens_lr(config: dict[str, Any]) -> None:
    """Refuse a learning rate of new tokens without new tokens, such as a recipe's with other data."""
    if config.get("tokens_lr") is not None and not config.get("new_tokens"):
        raise UserError(
            f"{config['tokens_lr']:g} is for new tokens, but there are none",
            key="tokens_lr",
            remedy="""set 'new_tokens=[{token: "<my_cat>", init: cat}]', or tokens_lr=null""",
        )


def check_model(config: dict[str, Any], trust: tuple[str, ...]) -> None:
    """Check the config groups that define what is trained and how.

    Raises:
        UserError: a setting is invalid.
    """
    check_node(config["backbone"], "backbone", trust)
    check_node(config["method"], "method", trust, _PASSED)
    for group in ("objective", "lr_schedule"):
        check_node(config[group], group, trust)
    _check_optimizer(config["optimizer"], trust)
    _check_prodigy(config, trust)
    _check_tokens_lr(config)
