"""A model's tensors in one file: safetensors, or a pickle if it was asked for, read without running its code."""

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
from sdtune.formats.files import read_safetensors


class _Inert:
    """Stands for a class that a file only names."""


_NAMED = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)
"""What the authors' own files name beside their tensors: the training's callbacks, as keys of a table."""

_DAMAGE = (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error)
"""What the reader of pickles raises on bytes that are none."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def read_checkpoint(path: Path, allow_pickle: bool, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of ``path`` and its header's metadata.

    Args:
        path: ``.safetensors``, or a pickle by its suffix.
        allow_pickle: whether a pickle may be read: with torch's ``weights_only``, which makes tensors and plain
            containers and refuses everything else.
        key: of the setting that named it, for messages.

    Raises:
        UserError: a pickle that is not allowed, or holds more than tensors; a file that is damaged.
    """
    if path.suffix not in PICKLES:
        return read_safetensors(path)
    if not allow_pickle:
        raise UserError(
            f"{path} is a pickle, which can carry code",
            key=key,
            remedy="get it as .safetensors, or, if you trust where it comes from, set"
            " backbone.allow_pickle=true: then tensors alone are taken from it",
        )
    with path.open("rb") as handle:
        begins = handle.read(1)
    if not zipfile.is_zipfile(path) and begins not in (b"\x80", b"P"):
        raise UserError(
            f"{path} is no checkpoint of torch's, perhaps a web page under that name", key=key, remedy="get it again"
        )
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in _NAMED]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors{_named(path)} and was not read",
            key=key,
            remedy="get it as .safetensors, or from someone else",
        ) from error
    except _DAMAGE as error:
        why = shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        raise UserError(f"{path} cannot be read ({why})", key=key, remedy="copy it again") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no tensors by name; a checkpoint's state dict is expected", key=key)
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}, {}


def _named(path: Path) -> str:
    """The classes and functions that the pickle ``path`` names; they are not known in torch's form before 1.6."""
    try:
        named = sorted({*torch.serialization.get_unsafe_globals_in_checkpoint(path)} - {*_NAMED})
    except (pickle.UnpicklingError, *_DAMAGE):
        return ", or is damaged,"
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return f" ({', '.join(named[:3])}{more})" if named else ", or is damaged,"
