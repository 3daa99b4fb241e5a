"""Model card: what an artifact is, how it was made, what it scores.

Mitchell et al. 2019, "Model cards for model reporting"; the front matter is the hub's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from sdtune.exporting.artifact import Artifact
from sdtune.files import replacing, write_text
from sdtune.paths import is_hub_id
from sdtune.runs.layout import CARD, CARD_GRID
from sdtune.runs.metrics import finite

_TAGS = {"lora": ["lora"], "words": ["textual_inversion"], "controlnet": ["controlnet"], "model": []}
_USE = {
    "lora": "diffusers: `pipe.load_lora_weights(FOLDER)`; ComfyUI, A1111: `{name}.safetensors` among their LoRAs",
    "words": "diffusers: `pipe.load_textual_inversion(FOLDER)`; A1111, ComfyUI: the word's own file among embeddings",
    "controlnet": "diffusers: `ControlNetModel.from_pretrained('{name}')`",
    "model": "diffusers: `StableDiffusionPipeline.from_pretrained('{name}')`",
}
_SETTINGS = ("method", "optimizer", "lr_schedule", "trainer", "objective")
_FIGURES = 12


def write_card(
    folder: Path,
    artifact: Artifact,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    metrics: Mapping[str, Any],
    grid: Path | None,
) -> Path:
    """``README.md`` in ``folder``, with the sample ``grid`` beside it.

    Args:
        folder: the artifact's.
        artifact: what lies in it.
        config: the run's, resolved.
        facts: ``family``, ``backbone`` (its name), ``hash``, ``images``, ``side`` (in pixels), ``captions`` and
            ``trigger``.
        metrics: of ``metrics.json``.
        grid: of samples, before and after.
    """
    words = [f"`{token}`" for token in artifact.words] + ([f"`{facts['trigger']}`"] if facts.get("trigger") else [])
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
    lines += [f"{_WHAT[artifact.kind]}, trained with sdtune.", ""]
    if grid is not None and grid.is_file():
        _copy(grid, folder / CARD_GRID)
        lines += [f"![Before and after, the same prompts and seeds]({CARD_GRID})", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| base model | {_cell(facts['backbone'])}, weights `{str(facts['hash'])[:16]}` |"]
    lines += [f"| trigger words | {', '.join(words) or 'none'} |"]
    data = config.get("data", {})
    sizes = f"batch size {data.get('batch_size')}, {facts['side']} pixels"
    lines += [f"| data | {facts['images']} images, {sizes}; captions such as {_quoted(facts['captions'])} |"]
    lines += [f"| use | {_USE[artifact.kind].format(name=artifact.name)} |"]
    lines += ["| licence | **to be named by the author**; the base model's own applies too |", ""]
    lines += ["## Settings", "", "```json", json.dumps(_settings(config), indent=2, ensure_ascii=False), "```", ""]
    numbers = {k: v for k, v in finite(dict(metrics)).items() if isinstance(v, int | float)}
    lines += ["## Metrics", "", "| metric | value |", "|---|---|"]
    lines += [f"| {key} | {value:.4g} |" for key, value in list(numbers.items())[:_FIGURES]]
    more = len(numbers) - _FIGURES
    left = f"{more} further ones are in the run's `metrics.json`. " if more > 0 else ""
    lines += ["", f"{left}How each is measured: sdtune's `docs/evaluation.md`.", ""]
    target = folder / CARD
    write_text(target, "\n".join(lines))
    return target


def write_export_card(folder: Path, card: Path, artifact: Artifact, name: str, what: str, whole: bool) -> None:
    """The run's ``card`` for one of its exports in ``folder``: called ``name``, and saying ``what`` it is.

    Args:
        whole: whether it is a model by itself, whatever the run has trained.
    """
    text = card.read_text(encoding="utf-8")
    text = text.replace(f"\n# {artifact.name}\n", f"\n# {name}\n", 1)
    text = text.replace(f"{_WHAT[artifact.kind]}, trained with sdtune.", f"{what}. All below is of the run.", 1)
    for tag in _TAGS[artifact.kind] if whole else ():
        text = text.replace(f"- {tag}\n", "", 1)
    write_text(folder / card.name, text)
    if (grid := card.with_name(CARD_GRID)).is_file():
        _copy(grid, folder / grid.name)


def _copy(file: Path, target: Path) -> None:
    with replacing(target) as partial:
        shutil.copyfile(file, partial)


_WHAT = {
    "lora": "A LoRA for Stable Diffusion",
    "words": "A learned word (Textual Inversion) for Stable Diffusion",
    "controlnet": "A ControlNet for Stable Diffusion",
    "model": "A fine-tuned Stable Diffusion",
}


def _base(backbone: str) -> str | None:
    """The hub's name of the base model; nobody knows it of pocket or of a local folder."""
    return backbone if is_hub_id(backbone) and not Path(backbone).exists() else None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: config[key] for key in _SETTINGS if key in config}
    plain: dict[str, Any] = json.loads(json.dumps({**kept, "seed": config.get("seed")}, default=str))
    return {key: _without_targets(value) for key, value in plain.items()}


def _without_targets(value: Any) -> Any:
    if isinstance(value, str) and "/" in value:
        return Path(value).name  # folders of this machine are nobody's concern
    if not isinstance(value, dict):
        return value
    named = {"is": str(value["_target_"]).rpartition(".")[2]} if "_target_" in value else {}
    return {**named, **{k: _without_targets(v) for k, v in value.items() if not k.startswith("_") and v is not None}}


def _quoted(captions: Sequence[str]) -> str:
    return ", ".join(f"“{_cell(caption)}”" for caption in captions[:3])


def _cell(text: object) -> str:
    """Text of a stranger's, harmless within a table of Markdown."""
    plain = " ".join(str(text).split())
    for letter in "\\`*_[]<>|#":
        plain = plain.replace(letter, f"\\{letter}" if letter != "<" else "&lt;")
    return plain
