"""Model card of an artifact: description, settings, metrics.

Mitchell et al. 2019, "Model cards for model reporting"; the front matter follows the Hugging Face hub.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from sdtune.exporting.artifact import Artifact
from sdtune.files import read_json, replacing, write_text
from sdtune.formats.files import read_metadata
from sdtune.lr_schedule import warmup_limit
from sdtune.paths import is_hub_id
from sdtune.runs.layout import CARD, CARD_GRID
from sdtune.runs.metrics import OF_TRAINING, finite

_TAGS = {"lora": ["lora"], "embeddings": ["textual_inversion"], "controlnet": ["controlnet"], "model": []}
_USAGE = {
    "lora": "diffusers: `pipe.load_lora_weights(FOLDER)`; ComfyUI, A1111: `{name}.safetensors` in the LoRA folder",
    "embeddings": "diffusers: `pipe.load_textual_inversion(FOLDER)`; A1111, ComfyUI: the word's file as an embedding",
    "controlnet": "diffusers: `{controlnet}.from_pretrained('{name}')`",
    "model": "diffusers: `DiffusionPipeline.from_pretrained('{name}')`",
}
_USAGE_MERGED = {
    "pipeline": _USAGE["model"],
    "single_file": "diffusers: `from_single_file('{name}.safetensors')` of `StableDiffusionPipeline`, for SDXL of"
    " `StableDiffusionXLPipeline`, for SD 3 of `StableDiffusion3Pipeline`; ComfyUI, A1111: the file"
    " in the folder of the checkpoints",
}
_SETTINGS = ("method", "optimizer", "lr_schedule", "trainer", "objective")
_MAX_METRICS = 12


def write_card(
    folder: Path,
    artifact: Artifact,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    metrics: Mapping[str, Any],
    grid: Path | None,
) -> Path:
    """Write the model card, ``README.md``, into ``folder`` and copy the sample ``grid`` next to it.

    Args:
        folder: the artifact folder.
        artifact: the artifact in it.
        config: the run's resolved config.
        facts: ``family``, ``backbone`` (name), ``hash``, ``images`` (count), ``side`` (pixels), ``captions`` and
            ``trigger``.
        metrics: content of ``metrics.json``.
        grid: image file with samples before and after training.

    Returns:
        Path of the card.
    """
    tokens = [*artifact.words, *([facts["trigger"]] if facts.get("trigger") else [])]
    words = [f"`{token}`" for token in dict.fromkeys(tokens)]
    front = ModelCardData(
        license="other",
        license_name="to-be-named-by-the-author",
        base_model=_base(str(facts["backbone"])),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["stable-diffusion", "sdtune", *_TAGS[artifact.kind]],
        instance_prompt=facts.get("trigger") or next(iter(artifact.words), None),
    )
    lines = [f"---\n{front.to_yaml().strip()}\n---", "", f"# {artifact.name}", ""]
    lines += [f"{_DESCRIPTION[artifact.kind]}, trained with sdtune.", ""]
    if grid is not None and grid.is_file():
        _copy(grid, folder / CARD_GRID)
        lines += [f"![Samples before and after training, same prompts and seeds]({CARD_GRID})", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| base model | {_cell(facts['backbone'])}, weights `{str(facts['hash'])[:16]}` |"]
    lines += [f"| trigger words | {', '.join(words) or 'none'} |"]
    data = config.get("data", {})
    sizes = f"batch size {data.get('batch_size')}, {facts['side']} pixels"
    lines += [f"| data | {facts['images']} images, {sizes}; captions such as {_quoted(facts['captions'])} |"]
    lines += _rank_lines(artifact)
    lines += [f"| use | {_usage(artifact)} |"]
    lines += ["| license | **to be named by the author**; the license of the base model applies too |", ""]
    lines += ["## Settings", "", "```json", json.dumps(_settings(config), indent=2, ensure_ascii=False), "```", ""]
    target = folder / CARD
    write_text(target, "\n".join([*lines, *_metric_lines(metrics)]))
    return target


def _usage(artifact: Artifact) -> str:
    """How to load the artifact in other programs."""
    is_controlnet = artifact.kind == "controlnet"
    controlnet = read_json(artifact.path / "config.json")["_class_name"] if is_controlnet else None
    return _USAGE[artifact.kind].format(name=artifact.name, controlnet=controlnet)


def _rank_lines(artifact: Artifact) -> list[str]:
    """Row with rank and alpha of a LoRA in kohya format; the config has none if they are the default or a file's."""
    if artifact.kind != "lora" or not artifact.path.is_file():
        return []
    metadata = read_metadata(artifact.path)
    return [f"| LoRA | rank {metadata.get('ss_network_dim')}, alpha {metadata.get('ss_network_alpha')} |"]


def _metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The section of the card with at most :data:`_MAX_METRICS` numbers: those of the artifact, of the base, costs."""
    numbers = {k: v for k, v in finite(dict(metrics)).items() if isinstance(v, int | float)}
    order = sorted(numbers, key=lambda key: (key in OF_TRAINING, key.startswith("base_")))
    numbers = {key: numbers[key] for key in order}
    lines = ["## Metrics", "", "| metric | value |", "|---|---|"]
    lines += [
        f"| {key} | {value:,} |" if isinstance(value, int) else f"| {key} | {value:.4g} |"
        for key, value in list(numbers.items())[:_MAX_METRICS]
    ]
    more = len(numbers) - _MAX_METRICS
    omitted = f"{more} more metrics are in the run's `metrics.json`. " if more > 0 else ""
    return [*lines, "", f"{omitted}Definitions of the metrics: `docs/evaluation.md` of sdtune.", ""]


def write_export_card(folder: Path, card: Path, artifact: Artifact, name: str, what: str, merged: str | None) -> None:
    """Write the run's ``card``, adapted to one of its exports, into ``folder``.

    Args:
        name: title of the export.
        what: description of the export.
        merged: format of the full model into which the artifact is merged; then the hub tags of the artifact's kind
            are removed. None: the export has the artifact's kind.
    """
    text = card.read_text(encoding="utf-8")
    text = text.replace(f"\n# {artifact.name}\n", f"\n# {name}\n", 1)
    text = text.replace(
        f"{_DESCRIPTION[artifact.kind]}, trained with sdtune.", f"{what}. The sections below describe the run.", 1
    )
    # Other files of the run may have another rank or alpha.
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("| LoRA |"))
    if merged is not None:
        text = text.replace(f"| use | {_usage(artifact)} |", f"| use | {_USAGE_MERGED[merged].format(name=name)} |", 1)
        for tag in _TAGS[artifact.kind]:
            text = text.replace(f"- {tag}\n", "", 1)
    write_text(folder / card.name, text)
    if (grid := card.with_name(CARD_GRID)).is_file():
        _copy(grid, folder / grid.name)


def _copy(file: Path, target: Path) -> None:
    with replacing(target) as partial:
        shutil.copyfile(file, partial)


_DESCRIPTION = {
    "lora": "A LoRA for Stable Diffusion",
    "embeddings": "The embedding of a new word (Textual Inversion) for Stable Diffusion",
    "controlnet": "A ControlNet for Stable Diffusion",
    "model": "A fine-tuned Stable Diffusion",
}


def _base(backbone: str) -> str | None:
    """Hub id of the base model; None for pocket and local folders."""
    return backbone if is_hub_id(backbone) and not Path(backbone).exists() else None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    sections = {key: config[key] for key in _SETTINGS if key in config}
    plain: dict[str, Any] = json.loads(json.dumps({**sections, "seed": config.get("seed")}, default=str))
    if "lr_schedule" in plain and "trainer" in plain:  # the warm-up that was run, not the one that was set
        limit = warmup_limit(plain["trainer"]["max_steps"])
        plain["lr_schedule"]["warmup_steps"] = min(plain["lr_schedule"]["warmup_steps"], limit)
    return {key: _without_targets(value) for key, value in plain.items()}


def _without_targets(value: Any) -> Any:
    if isinstance(value, str) and "/" in value:
        return Path(value).name  # do not publish local paths
    if not isinstance(value, dict):
        return value
    class_name = {"is": str(value["_target_"]).rpartition(".")[2]} if "_target_" in value else {}
    return {
        **class_name,
        **{k: _without_targets(v) for k, v in value.items() if not k.startswith("_") and v is not None},
    }


def _quoted(captions: Sequence[str]) -> str:
    return ", ".join(f"“{_cell(caption)}”" for caption in captions[:3])


def _cell(text: object) -> str:
    """``text`` from an untrusted source, escaped for a cell of a Markdown table."""
    plain = " ".join(str(text).split())
    for character in "\\`*_[]<>|#":
        plain = plain.replace(character, f"\\{character}" if character != "<" else "&lt;")
    return plain
