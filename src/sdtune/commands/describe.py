"""The lines that a finished run prints: its metrics, its files, and a command that samples with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdtune.data import ImageDataModule
from sdtune.data.control.base import Computed
from sdtune.files import is_snapshot
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.formats.embeddings import FOLDER as EMBEDDINGS
from sdtune.runs.metrics import OF_TRAINING, unit
from sdtune.runs.sample_command import sample_command


def closing_lines(folder: Path, name: str, commit: str | None, data: ImageDataModule) -> list[str]:
    """Lines that name the files of the run in ``folder`` and a command that samples with them.

    Args:
        name: name of the artifact.
        commit: commit of a backbone from the hub; None for a local one.
        data: the training data; its first caption becomes the prompt.
    """
    lines = [f"metrics: {folder / 'metrics.json'}"]
    before_after = folder / "samples" / "before_after.png"
    if before_after.exists():
        lines.append(f"before and after: {before_after}")
    prompt = next(filter(None, data.all_prompts()), "PROMPT")
    more = []
    lora, model_folder = folder / "artifact" / f"{name}.safetensors", folder / "artifact" / name
    if commit is not None and not (model_folder / "model_index.json").is_file():
        more.append(f"backbone.revision={commit}")
    embeddings = sorted((folder / "artifact" / EMBEDDINGS).glob("*.safetensors"))
    embeddings = [file for file in embeddings if not is_snapshot(file.stem)]
    lines += [f"embedding for ComfyUI and A1111: {file}" for file in embeddings]
    if lora.exists():
        lines.append(f"LoRA for ComfyUI, A1111 and kohya's tools: {lora}")
        lines.append(f"LoRA for diffusers: {lora.with_name(FILE_NAME)}")
    elif (model_folder / "config.json").is_file():
        lines.append(f"ControlNet for diffusers: {model_folder}")
        computed = f", preprocess: {data.control.name}" if isinstance(data.control, Computed) else ""
        more.append(f"control=[{{image: FILE{computed}}}]")
    elif model_folder.is_dir():
        lines.append(f"pipeline folder for diffusers: {model_folder}")
    if lora.exists():
        more.append("strengths=0.5,0.75,1")
    return [*lines, f"sample with it: {sample_command(folder, prompt, *more)}"]


def metrics_table(metrics: Mapping[str, Any]) -> list[str]:
    """Table of the metrics before and after training, the reasons of missing metrics, and the cost of the training."""
    measured = [
        key
        for key, value in metrics.items()
        if key not in OF_TRAINING and not key.startswith("base_") and isinstance(value, int | float)
    ]
    rows = [("", "before", "after")]
    rows += [(key, _number(metrics.get(f"base_{key}"), key), _number(metrics[key], key)) for key in measured]
    lines = [f"{name:<28}{before:>12}{after:>12}".rstrip() for name, before, after in rows] if measured else []
    keys_by_reason: dict[str, list[str]] = {}
    for key, reason in metrics.get("reasons", {}).items():
        keys_by_reason.setdefault(reason, []).append(key)
    lines += [f"not measured: {', '.join(keys)}: {reason}" for reason, keys in keys_by_reason.items()]
    cost = [f"{key} {_number(metrics[key], key)}" for key in OF_TRAINING if metrics.get(key) is not None]
    return [*lines, *([f"cost of the training: {', '.join(cost)}"] if cost else [])]


def _number(value: Any, key: str) -> str:
    return "" if value is None else unit(value, key)
