"""Pipeline folders in the diffusers layout."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def copy_pipeline(source: Path, target: Path, without: Sequence[str]) -> None:
    """Copy the files of a pipeline folder, the components named in ``without`` left out."""
    target.mkdir(parents=True, exist_ok=True)
    for item in sorted(source.iterdir()):
        if item.is_file() and item.name == "model_index.json":
            shutil.copy2(item, target / item.name)
        elif item.is_dir() and item.name not in without and not item.name.startswith("."):
            shutil.copytree(item, target / item.name, dirs_exist_ok=True)


def save_component(module: Any, target: Path) -> None:
    """``config.json`` and safetensors of a diffusers model, replacing what was there only when written whole."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    module.save_pretrained(partial, safe_serialization=True)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
