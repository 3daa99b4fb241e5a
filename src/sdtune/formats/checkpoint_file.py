"""Tensors of a model in one file: safetensors, or a pickle if allowed, read without executing its code."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from sdtune.errors import UserError
from sdtune.formats.files import read_unchecked


class _Inert:
    """Placeholder for a class that a file references."""


_INERT_CLASSES = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)
"""Classes referenced in the authors' original files: training callbacks, as keys of a dict."""

_READ_ERRORS = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    struct.error,
)
"""Exceptions that ``torch.load`` raises for damaged files."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def read_checkpoint(path: Path, allow_pickle: bool, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and header metadata of ``path``.

    Args:
        path: a ``.safetensors`` file, or a pickle (by its suffix).
        allow_pickle: whether a pickle may be read: with torch's ``weights_only``, which creates only tensors and plain
            containers and rejects everything else.
        key: config key of ``path``, for error messages.

    Raises:
        UserError: the file is a pickle that is not allowed or that contains more than tensors, or it is damaged.
    """
    if path.suffix not in PICKLES:
        return read_unchecked(path)  # unused tensors of a checkpoint may be infinite, such as attention masks
    if not allow_pickle:
        raise UserError(
            f"{path} is a pickle, which can execute code",
            key=key,
            remedy="use a .safetensors file, or, if you trust its source, set backbone.allow_pickle=true"
            " (only tensors are read)",
        )
    with path.open("rb") as handle:
        first_byte = handle.read(1)
    is_zip = first_byte == b"P"
    if not is_zip and first_byte != b"\x80":
        raise UserError(f"{path} is not a torch checkpoint (perhaps a web page)", key=key, remedy="download it again")
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in _INERT_CLASSES]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} contains more than tensors{_referenced_names(path)} and was not read",
            key=key,
            remedy="use a .safetensors file, or a file from another source",
        ) from error
    except _READ_ERRORS as error:
        reason = shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason})", key=key, remedy="copy or download it again") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping):
        raise UserError(f"{path} contains no state dict", key=key, remedy="use a checkpoint with tensors by name")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}, {}


def _referenced_names(path: Path) -> str:
    """Classes and functions that the pickle ``path`` references; unknown for files of torch before 1.6."""
    try:
        names = sorted({*torch.serialization.get_unsafe_globals_in_checkpoint(path)} - {*_INERT_CLASSES})
    except _READ_ERRORS:
        return ", or is damaged,"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})" if names else ", or is damaged,"
