"""Find what an artifact's folder or file holds, a run's or another program's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sdtune.backbone.controlnet_files import is_controlnet
from sdtune.errors import UserError
from sdtune.files import is_partial
from sdtune.formats import embeddings, read_safetensors
from sdtune.formats.checkpoint_file import PICKLES
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.formats.read import is_lora

Kind = Literal["lora", "words", "controlnet", "model"]


@dataclass(frozen=True)
class Artifact:
    """One thing, and the words that were learned beside it.

    Attributes:
        kind: what it is.
        path: its file or folder.
        words: the vectors of new words, of ``words`` itself or beside a LoRA or a model.
        name: what its files are called.
    """

    kind: Kind
    path: Path
    name: str
    words: embeddings.Words = field(default_factory=dict)


def find_artifact(path: Path, key: str) -> Artifact:
    """What ``path`` is: a run's ``artifact`` folder, or a LoRA, an embedding, a ControlNet or a model by itself.

    Raises:
        UserError: none of these.
    """
    if path.is_file():
        return _of_file(path, key)
    if not path.is_dir():
        raise UserError(f"{path} does not exist", key=key, remedy="name a run's artifact folder, or a file")
    if (path / "model_index.json").is_file():
        return Artifact("model", path, path.name)
    if _is_net(path):
        return Artifact("controlnet", path, path.name)
    words = embeddings.read_folder(path)
    there = [entry for entry in path.iterdir() if not is_partial(entry)]
    wholes = sorted(entry for entry in there if (entry / "model_index.json").is_file() or _is_net(entry))
    if wholes:
        whole = wholes[0]
        return Artifact("controlnet" if _is_net(whole) else "model", whole, whole.name, words)
    if (path / FILE_NAME).is_file():
        named = [f.stem for f in sorted(path.glob("*.safetensors")) if f.name != FILE_NAME and not _aside(f.stem)]
        # The other form says more: alpha, the words that call it up, the steps.
        return Artifact(
            "lora", path / (f"{named[0]}.safetensors" if named else FILE_NAME), (named or ["lora"])[0], words
        )
    if words:
        return Artifact("words", path, embeddings.word(next(iter(words))), words)
    raise UserError(
        f"{path} holds no LoRA, embedding, ControlNet or model", key=key, remedy="name a run's artifact folder"
    )


def _aside(stem: str) -> bool:
    return embeddings.intermediate(stem) or stem.startswith(embeddings.FILE_NAME)


def _is_net(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text()).get("_class_name") == "ControlNetModel"


def _of_file(path: Path, key: str) -> Artifact:
    if path.suffix in PICKLES:
        return Artifact("model", path, path.stem)
    tensors, metadata = read_safetensors(path)
    if words := embeddings.parse(path, tensors, metadata):
        return Artifact("words", path, path.stem, words)
    if is_controlnet(tensors):
        return Artifact("controlnet", path, path.stem)
    if is_lora(tensors):
        return Artifact("lora", path, path.stem)
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        return Artifact("model", path, path.stem)
    raise UserError(f"{path} is no LoRA, embedding, ControlNet or whole model", key=key)
