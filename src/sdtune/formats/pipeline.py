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

from sdtune.files import read_json, replacing, write_json
from sdtune.formats.keys import canonical_key

_COMPONENTS = (
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "transformer",
    "unet",
    "vae",
)
_COPIED_SUFFIXES = (".json", ".txt", ".model")

STEMS = ("diffusion_pytorch_model", "model")
"""Stems of weight file names: of diffusers and of transformers."""


def copy_pipeline(
    source: Path,
    target: Path,
    without: Sequence[str],
    weights: Mapping[str, Sequence[Path]],
    absent: Sequence[str] = (),
) -> None:
    """Copy a text-to-image pipeline folder to the new folder ``target``, without the components in ``without``.

    It writes in place; the caller wraps it in :func:`sdtune.files.replacing`.

    The safety checker is omitted, also from the index: it was not trained, and that of a hub id is not downloaded.
    Pickles and other variants of the weights are not copied either.

    Args:
        source: pipeline folder in the diffusers layout.
        target: new folder.
        without: components that are not copied.
        weights: weight files of each component, one file or shards; the copies have no variant in their names.
        absent: folders that the copy does not have, nor names in its index.
    """
    target.mkdir(parents=True, exist_ok=True)
    index = read_json(source / "model_index.json")
    for name, value in index.items():
        if isinstance(value, list) and (name not in _COMPONENTS or name in absent):
            index[name] = [None, None]
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for component in _COMPONENTS:
        if component in without or component in absent or not (source / component).is_dir():
            continue
        (target / component).mkdir(exist_ok=True)
        for file in sorted((source / component).iterdir()):
            if file.is_file() and file.suffix in _COPIED_SUFFIXES and ".safetensors." not in file.name:
                shutil.copy2(file, target / component / file.name)
        if component.startswith("tokenizer"):
            _write_vocabulary_files(target / component)
        component_files = weights.get(component, ())
        names = {file.name: _without_variant(file.name) for file in component_files}
        for file in component_files:
            shutil.copy2(file, target / component / names[file.name])
        if len(component_files) > 1:
            _copy_index(source / component, target / component, names)


def write_scheduler(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the scheduler ``config`` of the pipeline ``folder``, and its class, if it names one, into the index."""
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    if "_class_name" in config:
        index = read_json(folder / "model_index.json")
        write_json(folder / "model_index.json", {**index, "scheduler": ["diffusers", config["_class_name"]]})


def weights_name(component: str) -> str:
    """File name of the weights of ``component``, as in transformers and diffusers."""
    return f"{STEMS[component.startswith('text_encoder')]}.safetensors"


def _write_vocabulary_files(folder: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt`` for older clients if there is only ``tokenizer.json``."""
    tokenizer_json, vocabulary = folder / "tokenizer.json", folder / "vocab.json"
    if vocabulary.is_file() or not tokenizer_json.is_file():
        return
    model = read_json(tokenizer_json)["model"]
    if "merges" not in model:  # T5's tokenizer
        return
    vocabulary.write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _without_variant(name: str) -> str:
    """Weight file ``name`` without a variant, such as ``fp16`` in ``model.fp16-00001-of-00002.safetensors``."""
    return re.sub(r"^([^.]+)\.[^.]+?((?:-\d{5}-of-\d{5})?\.safetensors)$", r"\1\2", name)


def _copy_index(source: Path, target: Path, names: Mapping[str, str]) -> None:
    """Copy the index of the shards ``names`` (old name -> new name) with the new names."""
    for file in sorted(source.glob("*.safetensors.index*.json")):
        index = read_json(file)
        if set(index["weight_map"].values()) == set(names):
            index["weight_map"] = {key: names[shard] for key, shard in index["weight_map"].items()}
            stem = file.name.partition(".safetensors.index")[0]
            (target / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
            return


def save_component(module: Any, target: Path) -> None:
    """Save ``config.json`` and safetensors of a diffusers model; an existing folder is replaced atomically."""
    with replacing(target) as partial:
        module.save_pretrained(partial, safe_serialization=True)


def save_text_encoder(module: Any, target: Path, instead: Mapping[str, Tensor] | None = None) -> None:
    """Save a CLIP text encoder as :func:`save_component` does, with the prefix ``text_model.`` in all keys.

    transformers >= 5.6 omits the prefix for a model that was built from a config; without it, older clients would
    silently use random weights.

    Args:
        module: a CLIP text encoder of transformers.
        target: folder.
        instead: tensors that replace those of ``module``.
    """
    with replacing(target) as partial:
        module.save_pretrained(partial, safe_serialization=True)
        file = partial / "model.safetensors"
        tensors = {canonical_key("text_encoder", key): value for key, value in load_file(file).items()}
        tensors |= instead or {}
        save_file(tensors, file, {"format": "pt"})
