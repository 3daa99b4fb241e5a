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
"""Embedding vectors [N, D] of each token, one tensor per text encoder; [0, D] where an encoder has none."""

FOLDER = "embeddings"
"""Folder of the files in A1111, ComfyUI and kohya format, which are named after the trigger word."""

_VECTORS = "emb_params"
_COUNT = "sdtune_text_encoders"
# Keys of the text encoders of SDXL and SD 3, the same in kohya, A1111, ComfyUI and diffusers' scripts.
_KEYS = ("clip_l", "clip_g", "t5xxl")


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

    For several text encoders all programs use the same format, so both files have the same content; encoders without
    vectors of the token are left out.

    Args:
        folder: target folder.
        vectors: embedding vectors [N, D] of each token, one tensor per text encoder.
        suffix: suffix of the file names.
        metadata: entries of the safetensors header.
        forms: export formats.
        dtype: dtype of the stored vectors.
    """
    written: list[Path] = []
    for token, rows in vectors.items():
        token_suffix = f"_{file_stem(token)}" if len(vectors) > 1 else ""
        # sdtune leaves out encoders that did not learn the word. The number of all encoders tells such a file from one
        # for a model with fewer encoders.
        header = {**metadata, "sdtune_token": token, _COUNT: str(len(rows))}
        diffusers_tensors, kohya_tensors = (
            ({token: rows[0].to(dtype)}, {_VECTORS: rows[0].to(dtype)})
            if len(rows) == 1
            else ({name: r.to(dtype) for name, r in zip(_KEYS, rows, strict=False) if len(r)},) * 2
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
    if rows and set(rows) == set(tensors) and set(rows) <= set(_KEYS):
        encoder_rows = _in_order(rows)
        encoder_rows = of_encoders(encoder_rows, max(len(encoder_rows), _encoder_count(metadata)))
        return {token: encoder_rows} if len({len(r) for r in encoder_rows if len(r)}) == 1 else {}
    if len(rows) == len(tensors) == 1:
        (key, vectors), *_ = rows.items()
        return {token if key == _VECTORS else key: (vectors,)}
    return {}


def _encoder_count(metadata: Mapping[str, str]) -> int:
    """Number of text encoders of the model that the embedding was trained with; 0 if the file does not say it."""
    stated = metadata.get(_COUNT, "")
    return int(stated) if stated in ("1", "2", "3") else 0


def of_encoders(rows: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """Vectors of an embedding for ``count`` text encoders: those that the file does not mention have none, [0, 0]."""
    return (*rows, *(torch.empty(0, 0) for _ in range(count - len(rows))))[:count]


def _in_order(rows: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """``rows`` in the order of the text encoders, up to the last one with vectors; [0, 0] for those without."""
    last = max(index for index, name in enumerate(_KEYS) if name in rows)
    return tuple(rows.get(name, torch.empty(0, 0)) for name in _KEYS[: last + 1])


def _bundled(source: Path, token: str, vectors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Vectors of each text encoder of an embedding that OneTrainer has saved in a LoRA file."""
    usual = {"t5xxl" if name == "t5" else name: rows for name, rows in vectors.items()}
    if unknown := usual.keys() - set(_KEYS):
        raise UserError(
            f"{source}: embedding {token!r} has {sorted(unknown)[0]}, which sdtune does not support",
            remedy="train it without output embeddings",
        )
    return _in_order(usual)


def read_folder(folder: Path) -> TokenVectors:
    """Embedding vectors by token, from diffusers' files in ``folder`` without snapshots."""
    words: TokenVectors = {}
    for file in sorted(folder.glob(f"{FILE_NAME}*.safetensors")):
        if not is_snapshot(file.stem):
            tensors, metadata = read_safetensors(file)
            words |= parse(file, tensors, metadata)
    return words
