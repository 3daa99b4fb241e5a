"""Pipeline folders in the diffusers layout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sdtune.files import replacing
from sdtune.formats.keys import canonical_key

_PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
_KEPT = (".json", ".txt")

STEMS = ("diffusion_pytorch_model", "model")
"""Of weight files: diffusers' and transformers' own."""


def copy_pipeline(source: Path, target: Path, without: Sequence[str], weights: Mapping[str, Sequence[Path]]) -> None:
    """Copy a text-to-image pipeline folder to the new folder ``target``, without the components in ``without``.

    It writes in place: a caller wraps it in :func:`sdtune.files.replacing`.

    The safety checker stays behind, and the index says so: it is no part of what was trained, and a hub id's is not
    downloaded. So do pickles and further variants of the weights.

    Args:
        weights: the files that hold each component's: one, or shards; a variant's lose its mark.
    """
    target.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = json.loads((source / "model_index.json").read_text())
    for name, value in index.items():
        if isinstance(value, list) and name not in _PARTS:
            index[name] = [None, None]
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for part in _PARTS:
        if part in without or not (source / part).is_dir():
            continue
        (target / part).mkdir(exist_ok=True)
        for file in sorted((source / part).iterdir()):
            if file.is_file() and file.suffix in _KEPT and ".safetensors." not in file.name:
                shutil.copy2(file, target / part / file.name)
        if part.startswith("tokenizer"):
            _spell_out(target / part)
        own = weights.get(part, ())
        names = {file.name: _plain(file.name) for file in own}
        for file in own:
            shutil.copy2(file, target / part / names[file.name])
        if len(own) > 1:
            _copy_index(source / part, target / part, names)


def weights_name(component: str) -> str:
    """What the file of ``component``'s weights is called: transformers' and diffusers' own names."""
    return f"{STEMS[component.startswith('text_encoder')]}.safetensors"


def _spell_out(tokenizer: Path) -> None:
    """Beside ``tokenizer.json``, which transformers writes alone today, the two files that older clients need."""
    whole, vocabulary = tokenizer / "tokenizer.json", tokenizer / "vocab.json"
    if vocabulary.is_file() or not whole.is_file():
        return
    model = json.loads(whole.read_text())["model"]
    vocabulary.write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def _plain(name: str) -> str:
    """A weight file's ``name`` without the mark of a variant: ``model.fp16-00001-of-00002.safetensors`` has one."""
    return re.sub(r"^([^.]+)\.[^.]+?((?:-\d{5}-of-\d{5})?\.safetensors)$", r"\1\2", name)


def _copy_index(source: Path, target: Path, names: Mapping[str, str]) -> None:
    """The index of the shards ``names``, by what they are called now."""
    for file in sorted(source.glob("*.safetensors.index*.json")):
        content: dict[str, Any] = json.loads(file.read_text())
        if set(content["weight_map"].values()) == set(names):
            content["weight_map"] = {key: names[shard] for key, shard in content["weight_map"].items()}
            stem = file.name.partition(".safetensors.index")[0]
            (target / f"{stem}.safetensors.index.json").write_text(json.dumps(content, indent=2))
            return


def save_component(module: Any, target: Path) -> None:
    """``config.json`` and safetensors of a diffusers model, replacing what was there only when written whole."""
    with replacing(target) as partial:
        module.save_pretrained(partial, safe_serialization=True)


def save_text_encoder(module: Any, target: Path, instead: Mapping[str, Tensor] | None = None) -> None:
    """The same of a CLIP text encoder, with ``text_model.`` before every key; ``instead`` of some tensors come others.

    transformers >= 5.6 leaves the prefix out of a model that was built from a config; without it older clients would
    take random weights, silently.
    """
    with replacing(target) as partial:
        module.save_pretrained(partial, safe_serialization=True)
        file = partial / "model.safetensors"
        tensors = {canonical_key("text_encoder", key): value for key, value in load_file(file).items()}
        tensors |= instead or {}
        save_file(tensors, file, {"format": "pt"})
