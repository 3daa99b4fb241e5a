"""Compare a run's saved config with today's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sdtune.errors import UserError
from sdtune.paths import command_line_folder

MAY_CHANGE = ("hardware.", "logger.", "callbacks.", "trainer.max_steps=", "hydra.", "hardware=", "logger=")
"""Starts of the overrides that a resumed run may have of its own."""

BEGUN_OTHERWISE = "finish it with the version of sdtune and the recipe that began it, or train anew"
"""What can be done with a run that this version cannot go on with; those of sdtune 0.1 are of that kind."""


def last_start(run: Path) -> Path:
    """Hydra's folder of the last time that ``run`` was started or resumed."""
    resumed = [file.parent for file in (run / ".hydra").glob("resume-*/overrides.yaml")]
    return max(resumed, key=lambda folder: int(folder.name.removeprefix("resume-")), default=run / ".hydra")


def own_config_folder(run: Path) -> str | None:
    """The ``--config-dir`` of the command line that ``run`` began with."""
    kept = run / ".hydra" / "hydra.yaml"
    sources = OmegaConf.select(OmegaConf.load(kept), "hydra.runtime.config_sources") if kept.is_file() else None
    return command_line_folder(sources or [])


def check_unchanged(config: Mapping[str, Any], run: Path) -> None:
    """UserError where ``config``, composed anew for ``run``, says otherwise than the one that ``run`` began with.

    Recipes and defaults are composed from the files of today, which may have been edited since. A setting that is new
    in them is passed over; one that is gone is not, because without it the run would be another.
    """
    kept = OmegaConf.load(run / ".hydra" / "config.yaml")
    before, now = flat(OmegaConf.to_container(kept, resolve=False)), flat(config)
    free = tuple(f.rstrip("=") for f in MAY_CHANGE)
    fixed = {
        key: value
        for key, value in before.items()
        if not key.startswith(free) and key != "resume" and not (isinstance(value, str) and "${" in value)
    }
    check_same(fixed, now, run, "run")


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, kind: str) -> None:
    """UserError where a setting of the ``kind`` (run or sweep) in ``folder`` is gone today, or has another value.

    A setting is gone that an older sdtune had. What is new since is passed over.

    Args:
        before: the flat config that it began with.
        now: the one that is composed today.
    """
    gone = next((key for key in before if key not in now and key != "resume"), None)
    if gone is not None:
        raise UserError(
            f"{folder} has the setting {gone}, which there is no more", key="resume", remedy=BEGUN_OTHERWISE
        )
    key = first_change(before, now)
    if key is not None:
        raise UserError(
            f"{key} is {now[key]!r} now and was {before[key]!r} when the {kind} began",
            key="resume",
            remedy="put the recipe or default that sets it back",
        )


def first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key of ``before`` that has another value ``now``; what is new since, or gone, is passed over."""
    return next((key for key, value in before.items() if key in now and now[key] != value), None)


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> leaf of a nested container."""
    if not isinstance(node, Mapping):
        return {key: node}
    return {
        name: leaf
        for part, value in node.items()
        for name, leaf in flat(value, f"{key}.{part}" if key else part).items()
    }
