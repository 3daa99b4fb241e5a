"""``sdtune sample run=RUN``: the backbone and the artifact of a run as the settings of ``sdtune sample``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from sdtune.backbone.pretrained import INHERITED
from sdtune.config.settings import read_saved_config
from sdtune.errors import UserError
from sdtune.exporting import Artifact, find_artifact


def with_run(config: DictConfig, typed: Sequence[str]) -> DictConfig:
    """``config`` with the backbone, the adapters and the ControlNet of the run in ``config.run``; loads no weights.

    Args:
        config: composed config of ``sdtune sample``.
        typed: overrides of the command line; those of a setting of the backbone take precedence over the run.

    Raises:
        UserError: the folder is not a finished run, an override contradicts it, or its ControlNet has no image.
    """
    run = Path(str(config.run)).expanduser()
    backbone = read_saved_config(run)["backbone"]
    artifact = find_artifact(run / "artifact", "run")
    keys = [text.lstrip("+~").split("=")[0] for text in typed]
    changed = [key for key in keys if key == "backbone" or key.startswith("backbone.")]
    refused = next((key for key in changed if key == "backbone" or _is_in_artifact(key, artifact)), None)
    if refused is not None:
        raise UserError(f"given by run={run}", key=refused, remedy="remove one of the two")
    if artifact.kind == "model":
        kept = {key: backbone[key] for key in ("_target_", "config", *INHERITED) if key in backbone}
        backbone = {**kept, "path": str(artifact.path)}
    settings = {key.removeprefix("backbone."): OmegaConf.select(config, key) for key in changed}
    with open_dict(config):
        config.backbone = {**backbone, **settings}
        if any((run / "artifact").glob("*.safetensors")) and OmegaConf.is_list(config.adapters):
            config.adapters = [{"path": str(run / "artifact")}, *config.adapters]
        if artifact.kind == "controlnet":
            config.control = _control(config.control, artifact.path)
    return config


def _is_in_artifact(key: str, artifact: Artifact) -> bool:
    return artifact.kind == "model" and key == "backbone.path"


def _control(entries: Any, path: Path) -> Any:
    """The settings ``control``, with ``path`` in each entry that names no ControlNet."""
    if not entries:
        raise UserError(
            "a ControlNet needs an image",
            key="control",
            remedy="set 'control=[{image: MAP}]', or 'control=[{image: PHOTO, preprocess: canny}]'",
        )
    if not OmegaConf.is_list(entries):
        return entries
    named = {"path": str(path)}
    return [OmegaConf.merge(named, entry) if isinstance(entry, DictConfig) else entry for entry in entries]
