"""Validation of the local folders of metric models (CLIP, DINO); nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from sdtune.errors import UserError


def check_named_model(key: str, name: str, called: str, types: Collection[str]) -> None:
    """Raise UserError unless ``name`` (``evaluation.<key>``) is a model folder with a ``model_type`` in ``types``."""
    folder = Path(name).expanduser()
    file = folder / "config.json"
    if not folder.is_dir() or not file.is_file():
        problem = "is not a folder" if not folder.is_dir() else "has no config.json"
        raise UserError(
            f"{name} {problem}", key=f"evaluation.{key}", remedy=f"name a local folder with a {called} model"
        )
    try:
        model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise UserError(
            f"{file} is not valid JSON ({error})", key=f"evaluation.{key}", remedy="save the model again"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{name} has no .safetensors weights", key=f"evaluation.{key}", remedy="save the model as safetensors"
        )
    if model_type not in types:
        raise UserError(
            f"{name} has a model of type {model_type}, expected {called}",
            key=f"evaluation.{key}",
            remedy=f"name a local folder with a {called} model",
        )
