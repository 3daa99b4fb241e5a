"""Read safetensors files and write them atomically; this module never reads pickles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdtune.errors import UserError
from sdtune.files import replacing


def for_safetensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` detached, contiguous and on the CPU, as safetensors requires."""
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` and header ``metadata`` to ``path``; create its folder if missing.

    Raises:
        UserError: ``path`` cannot be written; an existing file is unchanged.
    """
    try:
        with replacing(path) as partial:
            save_file(for_safetensors(tensors), partial, dict(metadata))
    # safetensors raises OS errors (disk full, no permission) as SafetensorError.
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written ({error})", remedy="use a writable folder with free space"
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Header metadata of ``path``, empty if there is none; reads no tensors.

    Raises:
        UserError: as :func:`read_safetensors`.
    """
    return _read(path, tensors=False)[1]


def read_keys(path: Path) -> set[str]:
    """Names of the tensors in ``path``; reads no tensors.

    Raises:
        UserError: as :func:`read_safetensors`.
    """
    read_metadata(path)
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in ``path`` by name; reads no tensors.

    Raises:
        UserError: as :func:`read_safetensors`.
    """
    read_metadata(path)
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata (empty if there is none) of ``path``.

    Raises:
        UserError: the file is missing, truncated or not in safetensors format, or a tensor has NaN or infinite values.
    """
    tensors, metadata = read_unchecked(path)
    check_finite(tensors, str(path))
    return tensors, metadata


def read_unchecked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As :func:`read_safetensors`, but values may be NaN or infinite."""
    return _read(path, tensors=True)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError if a value in ``tensors`` is NaN or infinite: everything computed with it would be NaN too."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(
                f"{where}: NaN or infinite values in {name} ({str(tensor.dtype).removeprefix('torch.')})",
                remedy="use another file: what was saved here is damaged",
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; by minimum and maximum, since ``isfinite`` is ten times slower."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # Functions for 8-bit floating point are missing in torch.
    values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
    return all(math.isfinite(value) for value in torch.aminmax(values))


def _read(path: Path, tensors: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file", remedy="use an existing .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys() if tensors else ()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({error})",
            remedy="copy it again if it is truncated, convert it to safetensors if it is a .ckpt, .bin or .pt file",
        ) from error
