"""Learned words as files: diffusers' ``learned_embeds.safetensors``, and the form of A1111, ComfyUI and kohya."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sdtune.formats.files import read_safetensors, write_safetensors

FILE_NAME = "learned_embeds"
"""Of diffusers' files, which hold one token each: ``learned_embeds.safetensors``, with several one a token."""

FOLDER = "embeddings"
"""Of the other form's files, which are called by the word that prompts use."""

_VECTORS = "emb_params"


def word(token: str) -> str:
    """``token`` as a file's name, by which A1111 and ComfyUI call it: ``<my_cat>`` is ``my_cat``."""
    return re.sub(r"[^\w-]+", "_", token).strip("_") or "token"


def intermediate(stem: str) -> bool:
    """Whether a file of this name is a step's or the best step's, beside the one that a run leaves in the end."""
    return re.search(r"-step\d{8}$|-best$", stem) is not None


def write(folder: Path, vectors: Mapping[str, Tensor], mark: str, metadata: Mapping[str, str]) -> None:
    """Both forms of each token's vectors [N, D] into ``folder``; ``mark`` ends the files' names."""
    for token, rows in vectors.items():
        several = f"_{word(token)}" if len(vectors) > 1 else ""
        about = {**metadata, "sdtune_token": token}
        write_safetensors(folder / f"{FILE_NAME}{several}{mark}.safetensors", {token: rows.float()}, about)
        write_safetensors(folder / FOLDER / f"{word(token)}{mark}.safetensors", {_VECTORS: rows.float()}, about)


def parse(source: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Vectors [N, D] by token, from what was read from ``source``, in either form; nothing for any other file.

    In the form without a token the file's name is the trigger, unless the header names another.
    """
    found = {
        metadata.get("sdtune_token", source.stem) if key == _VECTORS else key: rows if rows.dim() == 2 else rows[None]
        for key, rows in tensors.items()
        if rows.is_floating_point() and rows.dim() in (1, 2)
    }
    return found if len(found) == len(tensors) == 1 else {}


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Vectors by token, of diffusers' files in ``folder`` but intermediate ones."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob(f"{FILE_NAME}*.safetensors")):
        if not intermediate(file.stem):
            tensors, metadata = read_safetensors(file)
            found |= parse(file, tensors, metadata)
    return found
