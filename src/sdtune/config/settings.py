"""The top-level settings of a composed config, and the config as a plain container."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge, Gt
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import StringConstraints

from sdtune.backbone.new_tokens import NewToken
from sdtune.config.compose import without_hydra
from sdtune.config.schema import check_value
from sdtune.errors import UserError
from sdtune.files import is_partial
from sdtune.quoting import shell_override


@dataclass(frozen=True)
class Settings:
    """The run's own settings, at the top of the config.

    Args:
        name: names files; the data's name if None.
        seed: decides every draw of the run.
        save_every: optimizer steps between intermediate artifacts with their sample row.
        resume: the folder of the run that goes on.
        trust: further packages that ``_target_`` may name.
        optimized_metric: the metric that ``train`` returns to a sweeper.
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


def plain(config: DictConfig) -> dict[str, Any]:
    """A resolved plain container; UserError for a mandatory value that is missing."""
    own = without_hydra(config)
    try:
        missing = sorted(OmegaConf.missing_keys(own))
        if missing:
            raise UserError(f"{missing[0]} is missing: give {missing[0]}=...")
        container = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    assert isinstance(container, dict)
    named = {str(key): value for key, value in container.items()}
    if named.get("evaluation") and "_target_" not in named["evaluation"]:
        named["evaluation"] = {}  # evaluation=none behind a recipe that sets details of its own
    return named


def kept_config(run: Path) -> dict[str, Any]:
    """The resolved config of the finished ``run``; UserError for a folder that holds none."""
    kept = run / ".hydra" / "config.yaml"
    if not kept.is_file():
        raise UserError(f"{run} holds no run (no .hydra/config.yaml)", key="run", remedy="name the folder of one")
    if all(map(is_partial, (run / "artifact").glob("*"))):
        raise UserError(
            f"{run}/artifact is empty; the run has not finished, sdtune train {shell_override('resume', run)} goes on",
            key="run",
        )
    loaded = OmegaConf.load(kept)
    assert isinstance(loaded, DictConfig)
    return plain(loaded)


def read_settings(config: dict[str, Any]) -> Settings:
    """The top-level settings, checked."""
    hints = get_type_hints(Settings.__init__, include_extras=True)
    values = {key: config[key] for key in hints if config.get(key) is not None}
    for key, value in values.items():
        check_value(value, hints[key], key)
    if values.get("name") == "pytorch_lora_weights":
        raise UserError(
            "pytorch_lora_weights is the name of the file for diffusers", key="name", remedy="choose another"
        )
    tokens = tuple(NewToken(**token) for token in values.get("new_tokens", ()))
    return Settings(**{**values, "trust": tuple(values.get("trust", ())), "new_tokens": tokens})
