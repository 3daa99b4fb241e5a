"""Detect the kind of an artifact: a run's artifact folder, or a file or folder of another program."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sdtune.backbone.loading import is_controlnet
from sdtune.errors import UserError
from sdtune.files import is_partial, is_snapshot, read_json
from sdtune.formats import embeddings, read_safetensors
from sdtune.formats.checkpoint_file import PICKLES
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.formats.read import is_lora

Kind = Literal["lora", "embeddings", "controlnet", "model"]


@dataclass(frozen=True)
class Artifact:
    """A trained artifact and the embeddings of the new tokens that were trained with it.

    Attributes:
        kind: ``lora``, ``embeddings`` (of new tokens), ``controlnet`` or ``model``.
        path: its file or folder.
        name: name of its files, without suffix.
        words: embedding vectors of new tokens, of an artifact of kind ``embeddings`` or stored with a LoRA or a model.
    """

    kind: Kind
    path: Path
    name: str
    words: embeddings.TokenVectors = field(default_factory=dict)


def find_artifact(path: Path, key: str) -> Artifact:
    """Artifact at ``path``: a run's ``artifact`` folder, or a LoRA, an embedding, a ControlNet or a model alone.

    Raises:
        UserError: ``path`` is none of these; it names the setting ``key``.
    """
    if path.is_file():
        return _from_file(path, key)
    if not path.is_dir():
        raise UserError(f"{path} does not exist", key=key, remedy="use a run's artifact folder or a file")
    if (path / "model_index.json").is_file():
        return Artifact("model", path, path.name)
    if _is_controlnet_folder(path):
        return Artifact("controlnet", path, path.name)
    words = embeddings.read_folder(path)
    entries = [entry for entry in path.iterdir() if not is_partial(entry)]
    models = sorted(e for e in entries if (e / "model_index.json").is_file() or _is_controlnet_folder(e))
    if models:
        model = models[0]
        return Artifact("controlnet" if _is_controlnet_folder(model) else "model", model, model.name, words)
    if (path / FILE_NAME).is_file():
        kohya = [f.stem for f in sorted(path.glob("*.safetensors")) if f.name != FILE_NAME and not _is_other(f.stem)]
        # Prefer the kohya file: its metadata contains alpha, the trigger words and the number of steps.
        return Artifact(
            "lora", path / (f"{kohya[0]}.safetensors" if kohya else FILE_NAME), (kohya or ["lora"])[0], words
        )
    if words:
        return Artifact("embeddings", path, embeddings.file_stem(next(iter(words))), words)
    raise UserError(f"no LoRA, embedding, ControlNet or model in {path}", key=key, remedy="use a run's artifact folder")


def _is_other(stem: str) -> bool:
    """Whether the file ``stem`` is a snapshot or an embedding, not a LoRA."""
    return is_snapshot(stem) or stem.startswith(embeddings.FILE_NAME)


def _is_controlnet_folder(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and str(read_json(file).get("_class_name")).endswith("ControlNetModel")


def _from_file(path: Path, key: str) -> Artifact:
    if path.suffix in PICKLES:
        return Artifact("model", path, path.stem)
    tensors, metadata = read_safetensors(path)
    if words := embeddings.parse(path, tensors, metadata):
        return Artifact("embeddings", path, path.stem, words)
    if is_controlnet(tensors):
        return Artifact("controlnet", path, path.stem)
    if is_lora(tensors):
        return Artifact("lora", path, path.stem)
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        return Artifact("model", path, path.stem)
    raise UserError(f"{path} is not a LoRA, embedding, ControlNet or full model", key=key)
