"""Safetensors files, written whole or not at all; nothing is ever unpickled here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdtune.errors import UserError
from sdtune.files import replacing


def portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values detached, contiguous and in main memory, as safetensors asks."""
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes ``tensors`` and header ``metadata`` to ``path``, making its folder where there is none.

    Raises:
        UserError: ``path`` cannot be written; what stood there before still does.
    """
    try:
        with replacing(path) as partial:
            save_file(portable(tensors), partial, dict(metadata))
    # safetensors wraps the system's own errors (a full disk, no permission) in its own class.
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written ({error})", remedy="name a path in a folder you may write to"
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The header's metadata of ``path``, empty if it has none; no tensor is read.

    Raises:
        UserError: as :func:`read_safetensors`.
    """
    return _read(path, tensors=False)[1]


def read_keys(path: Path) -> set[str]:
    """The names of the tensors in ``path``; none is read.

    Raises:
        UserError: as :func:`read_safetensors`.
    """
    read_metadata(path)
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's metadata (empty if it has none) of ``path``.

    Raises:
        UserError: no file there, or one that is truncated or of another format.
    """
    return _read(path, tensors=True)


def _read(path: Path, tensors: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a .safetensors file is expected")
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys() if tensors else ()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({error})",
            remedy="copy it again if it was cut short, convert it to safetensors if it is a .ckpt, .bin or .pt file",
        ) from error
