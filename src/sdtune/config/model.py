"""The config groups ``method``, ``backbone``, ``objective``, ``optimizer`` and ``lr_schedule``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import torch
from annotated_types import Gt

from sdtune.config import hardware
from sdtune.config.build import build
from sdtune.config.schema import check_node, check_value
from sdtune.config.targets import resolve
from sdtune.errors import UserError

_COMMON = ("backbone", "objective", "optimizer", "lr_schedule", "new_tokens", "tokens_lr", *hardware.SWITCHES, "seed")


def _check_optimizer(node: dict[str, Any], trust: tuple[str, ...]) -> None:
    check_node(node, "optimizer", trust)
    check_value(node.get("lr"), Annotated[float, Gt(0)] | None, "optimizer.lr")
    try:
        # torch's annotations hold no ranges; its constructors check them, and want something to optimise.
        build(node, trust)([torch.nn.Parameter(torch.zeros(1))])
    except ValueError as error:
        raise UserError(str(error), key="optimizer") from error


_OWN_FACTOR = 0.1  # below it, a rate is another optimizer's


def _check_prodigy(config: dict[str, Any], trust: tuple[str, ...]) -> None:
    """Its rate is a factor on the step size that it finds, the same for all that it trains."""
    prodigyopt = sys.modules.get("prodigyopt")  # imported where the config names a class of it
    kind = resolve(str(config["optimizer"]["_target_"]), "optimizer", trust)
    if prodigyopt is None or not issubclass(kind, prodigyopt.Prodigy):
        return
    rate = config["optimizer"].get("lr", 1.0)
    if rate < _OWN_FACTOR:
        raise UserError(
            f"{rate:g} is a factor on the step size that Prodigy finds by itself",
            key="optimizer.lr",
            remedy="give optimizer.lr=1.0 behind the recipe",
        )
    rates = {"tokens_lr": config.get("tokens_lr")}
    rates |= {f"method.{key}": value for key, value in config["method"].items() if key.endswith("_lr")}
    own = [key for key, value in rates.items() if value is not None]
    if own:
        raise UserError(
            f"{own[0]}: Prodigy has one rate for all that it trains", remedy=f"give {own[0]}=null, or another optimizer"
        )


def check_model(config: dict[str, Any], trust: tuple[str, ...]) -> None:
    """The checks of what is trained and how."""
    check_node(config["backbone"], "backbone", trust)
    check_node(config["method"], "method", trust, _COMMON)
    for group in ("objective", "lr_schedule"):
        check_node(config[group], group, trust)
    _check_optimizer(config["optimizer"], trust)
    _check_prodigy(config, trust)
