"""Compare the saved config of a run with its newly composed config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sdtune.errors import UserError
from sdtune.files import read_yaml
from sdtune.paths import command_line_folder

MOVED = (
    *("data.path=", "data.class_path=", "data.validation_path=", "data.control.path="),
    *("backbone.path=", "backbone.vae="),
)
"""Overrides for folders and files that have moved. Checkpoints identify the data and the backbone by their content."""

MAY_CHANGE = (
    *("hardware.", "logger.", "callbacks.", "evaluation.", "trainer.max_steps=", "trainer.epochs="),
    *("hydra.", "hardware=", "logger=", "evaluation=", *MOVED),
)
"""Prefixes of the overrides that may change when a run is resumed."""

_MOVED_SOURCE = re.compile(r"data\.sources\.[^.=]+\.(path|class_path|validation_path|control\.path)(=|$)")
"""Folders and files of the sources of a mix that have moved."""


def may_change(text: str) -> bool:
    """Whether an override, or the key of a setting, may change when a run is resumed."""
    text = text.lstrip("+~")
    return text.startswith(tuple(MAY_CHANGE)) or _MOVED_SOURCE.match(text) is not None


NOT_RESUMABLE_REMEDY = "use the version of sdtune and the recipe that started it, or start a new run"
"""Remedy for a run that this version cannot resume, such as a run of sdtune 0.1."""


def last_start(run: Path) -> Path:
    """Hydra folder of the last start or resumption of ``run``."""
    resumed = [file.parent for file in (run / ".hydra").glob("resume-*/overrides.yaml")]
    return max(resumed, key=lambda folder: int(folder.name.removeprefix("resume-")), default=run / ".hydra")


def saved_config_dir(run: Path) -> str | None:
    """The ``--config-dir`` of the command line that started ``run``; None if it had none."""
    saved = run / ".hydra" / "hydra.yaml"
    if not saved.is_file() or "command-line" not in saved.read_text(encoding="utf-8", errors="replace"):
        return None
    return command_line_folder(OmegaConf.select(read_yaml(saved), "hydra.runtime.config_sources") or [])


def check_unchanged(config: Mapping[str, Any], run: Path) -> None:
    """Raise UserError if ``config``, newly composed for ``run``, differs from the config with which ``run`` started.

    Recipes and defaults are composed from their current files, which may have been edited since. New keys are ignored;
    a removed key is an error, because it would change the run.
    """
    saved = read_yaml(run / ".hydra" / "config.yaml", "resume")
    before, now = flat(OmegaConf.to_container(saved, resolve=False)), flat(config)
    fixed = {key: value for key, value in before.items() if not may_change(f"{key}=")}
    check_same(fixed, now, run, "run")


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, kind: str) -> None:
    """Raise UserError if a config key of the ``kind`` (run or sweep) in ``folder`` was removed or has another value.

    A key may be missing because an older version of sdtune had it. New keys are ignored, and values with an
    interpolation, which another setting decides.

    Args:
        before: the flat config with which it started.
        now: the flat config composed now.
    """
    before = {key: value for key, value in before.items() if key != "resume" and "${" not in str(value)}
    removed_key = next((key for key in before if key not in now), None)
    if removed_key is not None:
        raise UserError(
            f"{folder} has the setting {removed_key}, which no longer exists", key="resume", remedy=NOT_RESUMABLE_REMEDY
        )
    key = first_change(before, now)
    if key is not None:
        raise UserError(
            f"{key} is {now[key]!r} now and was {before[key]!r} when the {kind} started",
            key="resume",
            remedy="restore the old value in the recipe or default that sets it",
        )


def first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """First key of ``before`` with another value ``now``; added and removed keys are ignored."""
    return next((key for key, value in before.items() if key in now and now[key] != value), None)


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """Flatten a nested container: dotted key -> leaf value."""
    if not isinstance(node, Mapping):
        return {key: node}
    return {
        name: leaf
        for part, value in node.items()
        for name, leaf in flat(value, f"{key}.{part}" if key else part).items()
    }
