"""Learned embeddings as files: ``learned_embeds.safetensors`` of diffusers, and the form of A1111, ComfyUI, kohya."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sdtune.formats.files import read_safetensors, write_safetensors

FILE_NAME = "learned_embeds"
"""Of diffusers' files, which hold one token each: ``learned_embeds.safetensors``, with several one a token."""

Words = dict[str, tuple[Tensor, ...]]
"""The vectors [N, D] of each word, one of each text encoder: SDXL has two."""

FOLDER = "embeddings"
"""Of the other form's files, which are called by the word that prompts use."""

_VECTORS = "emb_params"
_TWO = ("clip_l", "clip_g")  # SDXL's encoders, as kohya, A1111, ComfyUI and diffusers' scripts all call them


def word(token: str) -> str:
    """``token`` as a file's name, by which A1111 and ComfyUI call it: ``<my_cat>`` is ``my_cat``."""
    return re.sub(r"[^\w-]+", "_", token).strip("_") or "token"


def intermediate(stem: str) -> bool:
    """Whether a file of this name is a step's or the best step's, beside the one that a run leaves in the end."""
    return re.search(r"-step\d{8}$|-best$", stem) is not None


def write(
    folder: Path,
    vectors: Mapping[str, Sequence[Tensor]],
    mark: str,
    metadata: Mapping[str, str],
    forms: Sequence[str] = ("diffusers", "kohya"),
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Each token's vectors into ``folder``, as the ``forms`` have it; ``mark`` ends the files' names, which come back.

    For two text encoders all programs share one form, so the two files hold the same.
    """
    written: list[Path] = []
    for token, rows in vectors.items():
        several = f"_{word(token)}" if len(vectors) > 1 else ""
        about = {**metadata, "sdtune_token": token}
        plain, other = (
            ({token: rows[0].to(dtype)}, {_VECTORS: rows[0].to(dtype)})
            if len(rows) == 1
            else ({name: each.to(dtype) for name, each in zip(_TWO, rows, strict=True)},) * 2
        )
        files = {
            "diffusers": (folder / f"{FILE_NAME}{several}{mark}.safetensors", plain),
            "kohya": (folder / FOLDER / f"{word(token)}{mark}.safetensors", other),
        }
        for form in forms:
            write_safetensors(*files[form], about)
            written.append(files[form][0])
    return written


def parse(source: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Words:
    """The vectors of each token in what was read from ``source``, in any form; nothing for any other file.

    In the forms without a token the file's name is the trigger, unless the header names another.
    """
    rows = {
        key: tensor if tensor.dim() == 2 else tensor[None]
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.dim() in (1, 2)
    }
    named = metadata.get("sdtune_token", source.stem)
    if set(rows) == set(tensors) == set(_TWO):
        both = tuple(rows[name] for name in _TWO)
        return {named: both} if len(both[0]) == len(both[1]) else {}
    if len(rows) == len(tensors) == 1:
        (key, only), *_ = rows.items()
        return {named if key == _VECTORS else key: (only,)}
    return {}


def read_folder(folder: Path) -> Words:
    """Vectors by token, of diffusers' files in ``folder`` but intermediate ones."""
    found: Words = {}
    for file in sorted(folder.glob(f"{FILE_NAME}*.safetensors")):
        if not intermediate(file.stem):
            tensors, metadata = read_safetensors(file)
            found |= parse(file, tensors, metadata)
    return found
