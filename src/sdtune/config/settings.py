"""The top-level settings of a composed config, and the config as a plain container."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge, Gt, Interval
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import StringConstraints

from sdtune.backbone.new_tokens import NewToken
from sdtune.config.compose import without_hydra
from sdtune.config.schema import check_value
from sdtune.errors import UserError
from sdtune.files import is_partial, read_yaml
from sdtune.paths import config_folder
from sdtune.quoting import shell_override
from sdtune.runs.hydra_values import as_current, saved_hydra


@dataclass(frozen=True)
class Settings:
    """Top-level settings of the config.

    Args:
        name: base name of the artifact files; None: name of the data.
        seed: seed of all random numbers of the run.
        save_every: optimizer steps between snapshots with their sample images; None: no snapshots.
        resume: folder of the run to continue.
        trust: additional packages that ``_target_`` may name.
        optimized_metric: metric of ``metrics.json`` that a search optimizes and ``sdtune report`` ranks by.
        new_tokens: new tokens to learn in addition to the weights that the method trains, such as
            ``[{token: "<my_cat>", init: cat, vectors: 4}]``.
        tokens_lr: learning rate of their embedding vectors; None: ``optimizer.lr``.
        trial: number of the job's Optuna trial; set by the sweeper.
    """

    name: Annotated[str, StringConstraints(pattern=r"^\w[\w .+-]*$")] | None = None
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    save_every: Annotated[int, Ge(1)] | None = None
    resume: str | None = None
    trust: tuple[str, ...] = ()
    optimized_metric: str | None = None
    new_tokens: tuple[NewToken, ...] = ()
    tokens_lr: Annotated[float, Gt(0)] | None = None
    trial: Annotated[int, Ge(0)] | None = None


TRAINING = (
    *("method", "backbone", "objective", "optimizer", "lr_schedule", "trainer", "hardware", "callbacks"),
    *("data", "checkpoint", "evaluation", "logger"),
)
"""Config groups of a training."""

_NODES = (*TRAINING, "paths", "sampling")
_OPTIONAL_NODES = ("evaluation", "logger")


def _check_groups(values: Mapping[str, Any], required: Sequence[str]) -> None:
    """Check that each config group is a mapping; an override such as ``callbacks=8`` replaces the complete group."""
    for name in _NODES:
        if name not in values:
            if name in required:
                raise UserError("no option is chosen", key=name, remedy=f"set {name}=OPTION")
        elif not isinstance(values[name], Mapping) and not (values[name] is None and name in _OPTIONAL_NODES):
            raise UserError(
                f"got {values[name]!r}, expected settings", key=name, remedy=f"set {name}=OPTION, or {name}.KEY=VALUE"
            )
    for group in ("callbacks", "logger"):
        for name, node in (values.get(group) or {}).items():
            if node is not None and not (isinstance(node, Mapping) and "_target_" in node):
                is_option = (config_folder() / group / f"{name}.yaml").is_file()
                instead = f"add {group}={name}" if is_option else "set its settings one by one"
                raise UserError(
                    f"got {node!r} without _target_", key=f"{group}.{name}", remedy=f"set it to null, or {instead}"
                )
    if "trust" in values:
        check_value(values["trust"], list[str], "trust")


def plain(config: DictConfig, required: Sequence[str] = ()) -> dict[str, Any]:
    """Resolve ``config`` into a plain dict without the node ``hydra``.

    Args:
        config: a composed or saved config.
        required: names of the config groups that it must have.

    Raises:
        UserError: a mandatory value or group is missing, a group is not a mapping, or an interpolation fails.
    """
    job_config = without_hydra(config)
    try:
        missing = sorted(OmegaConf.missing_keys(job_config))
        if missing:
            raise UserError("missing value", key=missing[0], remedy=f"set {missing[0]}=VALUE")
        container = OmegaConf.to_container(job_config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    assert isinstance(container, dict)
    values = {str(key): value for key, value in container.items()}
    _check_groups(values, required)
    if values.get("evaluation") and "_target_" not in values["evaluation"]:
        values["evaluation"] = {}  # evaluation=none after a recipe that sets options of its evaluation
    return values


def read_saved_config(run: Path) -> dict[str, Any]:
    """Resolved config of the finished run in the folder ``run``.

    Raises:
        UserError: the folder is not a run folder, or the run is unfinished.
    """
    file = run / ".hydra" / "config.yaml"
    if not file.is_file():
        if (run / "multirun.yaml").is_file():
            raise UserError(f"{run} is a sweep", key="run", remedy=f"use one of its runs, such as {run / '0'}")
        raise UserError(f"{run} is not a run folder (.hydra/config.yaml is missing)", key="run")
    if all(map(is_partial, (run / "artifact").glob("*"))):
        raise UserError(
            f"{run}/artifact is empty because the run is unfinished",
            key="run",
            remedy=f"continue it with: sdtune train {shell_override('resume', run)}",
        )
    saved = read_yaml(file, "run")
    if not isinstance(saved, DictConfig) or not {"method", "backbone", "data"} <= {*saved}:
        raise UserError(f"{file} is not the config of a training", key="run", remedy="restore it from a copy")
    with as_current(saved_hydra(run / ".hydra", "run")):
        return plain(saved)


def check_name(name: str) -> None:
    """Check the base name of the artifact files: the setting ``name``, or the name of the data's folder.

    Raises:
        UserError: the name is reserved, is not UTF-8, or is too long for a file name.
    """
    remedy = "set name=NAME"
    if not name.strip("."):
        raise UserError("the name of the data folder is empty", key="name", remedy=remedy)
    if name == _RESERVED_NAME:
        raise UserError(f"{name} is the file name of the diffusers format", key="name", remedy=remedy)
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"{name!r} is not UTF-8", key="name", remedy=remedy) from error
    if length > _MAX_NAME_BYTES:
        raise UserError(f"{name[:20]}... is {length} bytes long, max {_MAX_NAME_BYTES}", key="name", remedy=remedy)


_RESERVED_NAME = "pytorch_lora_weights"
_MAX_NAME_BYTES = 200
"""File systems allow 255 bytes for a file name; suffixes of snapshots and formats are put after the name."""


def read_settings(config: dict[str, Any]) -> Settings:
    """Check the top-level settings and return them.

    Raises:
        UserError: a setting is invalid.
    """
    hints = get_type_hints(Settings.__init__, include_extras=True)
    values = {key: config[key] for key in hints if config.get(key) is not None}
    for key, value in values.items():
        check_value(value, hints[key], key)
    tokens = tuple(NewToken(**token) for token in values.get("new_tokens", ()))
    return Settings(**{**values, "trust": tuple(values.get("trust", ())), "new_tokens": tokens})
