"""Validation of the local folders of metric models (CLIP, DINO); nothing is downloaded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sdtune.errors import UserError
from sdtune.files import read_json


def check_named_model(key: str, name: str, called: str, types: Collection[str]) -> None:
    """Raise UserError unless ``name`` (``evaluation.<key>``) is a model folder with a ``model_type`` in ``types``."""
    folder = Path(name).expanduser()
    file = folder / "config.json"
    if not folder.is_dir() or not file.is_file():
        problem = "is not a folder" if not folder.is_dir() else "has no config.json"
        raise UserError(
            f"{name} {problem}", key=f"evaluation.{key}", remedy=f"name a local folder with a {called} model"
        )
    model_type = read_json(file, f"evaluation.{key}", "save the model again").get("model_type")
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
