"""Folders of measuring models (CLIP, DINO) that the user names; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from sdtune.errors import UserError


def check_named_model(key: str, name: str, called: str, types: Collection[str]) -> None:
    """UserError where ``name`` (``evaluation.<key>``) is no folder whose ``config.json`` is of one of ``types``."""
    folder = Path(name).expanduser()
    file = folder / "config.json"
    if not folder.is_dir() or not file.is_file():
        lack = "is not a folder" if not folder.is_dir() else "holds no config.json"
        raise UserError(f"{name} {lack}", key=f"evaluation.{key}", remedy=f"name a local folder with a {called} model")
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error})", key=f"evaluation.{key}") from error
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{name} holds no weights as .safetensors, which alone are read", key=f"evaluation.{key}")
    if kind not in types:
        raise UserError(f"{name} holds a model of the type {kind}, and a {called} is needed", key=f"evaluation.{key}")
