"""Textual inversion embedding files: ``learned_embeds.safetensors`` of diffusers; format of A1111, ComfyUI, kohya."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sdtune.errors import UserError
from sdtune.files import is_snapshot
from sdtune.formats.files import read_safetensors, write_safetensors
from sdtune.formats.lora_names import without_bundled_embeddings

FILE_NAME = "learned_embeds"
"""Stem of diffusers' embedding files: ``learned_embeds.safetensors``; with several tokens, one file per token."""

TokenVectors = dict[str, tuple[Tensor, ...]]
"""Embedding vectors [N, D] of each token, one tensor per text encoder (two for SDXL)."""

FOLDER = "embeddings"
"""Folder of the files in A1111, ComfyUI and kohya format, which are named after the trigger word."""

_VECTORS = "emb_params"
# Keys of the two CLIP text encoders of SDXL, the same in kohya, A1111, ComfyUI and diffusers' scripts.
_ENCODER_KEYS = ("clip_l", "clip_g")


def file_stem(token: str) -> str:
    """File name of ``token``, which A1111 and ComfyUI use as the trigger word: ``my_cat`` for ``<my_cat>``."""
    return re.sub(r"[^\w-]+", "_", token).strip("_") or "token"


def write(
    folder: Path,
    vectors: Mapping[str, Sequence[Tensor]],
    suffix: str,
    metadata: Mapping[str, str],
    forms: Sequence[str] = ("diffusers", "kohya"),
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Write the embedding vectors of each token to ``folder`` and return the paths.

    For two text encoders all programs use the same format, so both files have the same content.

    Args:
        folder: target folder.
        vectors: embedding vectors [N, D] of each token, one tensor per text encoder.
        mark: suffix of the file names.
        metadata: entries of the safetensors header.
        forms: export formats.
        dtype: dtype of the stored vectors.
    """
    written: list[Path] = []
    for token, rows in vectors.items():
        token_suffix = f"_{file_stem(token)}" if len(vectors) > 1 else ""
        header = {**metadata, "sdtune_token": token}
        diffusers_tensors, kohya_tensors = (
            ({token: rows[0].to(dtype)}, {_VECTORS: rows[0].to(dtype)})
            if len(rows) == 1
            else ({name: encoder_rows.to(dtype) for name, encoder_rows in zip(_ENCODER_KEYS, rows, strict=True)},) * 2
        )
        files = {
            "diffusers": (folder / f"{FILE_NAME}{token_suffix}{suffix}.safetensors", diffusers_tensors),
            "kohya": (folder / FOLDER / f"{file_stem(token)}{suffix}.safetensors", kohya_tensors),
        }
        for export_format in forms:
            write_safetensors(*files[export_format], header)
            written.append(files[export_format][0])
    return written


def parse(source: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> TokenVectors:
    """Embedding vectors of each token in ``tensors`` read from ``source``, in any format; empty for any other file.

    In formats that do not store the token, it is the file name, unless the metadata contains ``sdtune_token``.
    """
    rows = {
        key: tensor if tensor.dim() == 2 else tensor[None]
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.dim() in (1, 2)
    }
    if bundled := without_bundled_embeddings(tensors)[1]:
        return {token: _bundled(source, token, vectors) for token, vectors in bundled.items()}
    token = metadata.get("sdtune_token", source.stem)
    if set(rows) == set(tensors) == set(_ENCODER_KEYS):
        encoder_rows = tuple(rows[name] for name in _ENCODER_KEYS)
        return {token: encoder_rows} if len(encoder_rows[0]) == len(encoder_rows[1]) else {}
    if len(rows) == len(tensors) == 1:
        (key, vectors), *_ = rows.items()
        return {token if key == _VECTORS else key: (vectors,)}
    return {}


def _bundled(source: Path, token: str, vectors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Vectors of each text encoder of an embedding that OneTrainer has saved in a LoRA file."""
    if unknown := vectors.keys() - set(_ENCODER_KEYS):
        raise UserError(
            f"{source}: embedding {token!r} has {sorted(unknown)[0]}, which sdtune does not support",
            remedy="train it without output embeddings",
        )
    return tuple(vectors[name] for name in _ENCODER_KEYS if name in vectors)


def read_folder(folder: Path) -> TokenVectors:
    """Embedding vectors by token, from diffusers' files in ``folder`` without snapshots."""
    words: TokenVectors = {}
    for file in sorted(folder.glob(f"{FILE_NAME}*.safetensors")):
        if not is_snapshot(file.stem):
            tensors, metadata = read_safetensors(file)
            words |= parse(file, tensors, metadata)
    return words
