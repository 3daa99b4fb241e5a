"""Tables of tensor names: the original layout of a file, and diffusers or transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file in the original layout, and the tensors of diffusers or transformers that it consists of.

    Attributes:
        original: name in the file.
        names: names in diffusers or transformers. Several tensors are concatenated on the first axis in the file, such
            as query, key and value.
        change: difference between the values in the file and in diffusers. ``halves_swapped``: the two halves of the
            first axis are exchanged; ``transposed``: a matrix is transposed; ``convolution``: a matrix is a 1x1
            convolution in the file.
    """

    original: str
    names: tuple[str, ...]
    change: Literal["none", "halves_swapped", "transposed", "convolution"] = "none"


def to_original(tensors: Mapping[str, Tensor], entries: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """Tensors of a file in the original layout, from all ``tensors`` that ``entries`` name."""
    originals: dict[str, Tensor] = {}
    for entry in entries:
        parts = [tensors[name] for name in entry.names]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if entry.change == "halves_swapped":
            tensor = swap_halves(tensor)
        elif entry.change == "transposed":
            tensor = tensor.T.contiguous()
        elif entry.change == "convolution":
            tensor = tensor[:, :, None, None]
        originals[entry.original] = tensor
    return originals


def from_original(tensors: Mapping[str, Tensor], entries: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """The inverse of :func:`to_original`. Tensors that the file lacks are omitted; wrong shapes stay wrong."""
    converted: dict[str, Tensor] = {}
    for entry in entries:
        if entry.original not in tensors:
            continue
        tensor = tensors[entry.original]
        if entry.change == "halves_swapped":
            tensor = swap_halves(tensor)
        elif entry.change == "transposed":
            tensor = tensor.T.contiguous()
        elif entry.change == "convolution" and tensor.dim() == 4:
            tensor = tensor.flatten(1)
        if len(entry.names) == 1:
            converted[entry.names[0]] = tensor
        elif tensor.dim():
            # Copy: the parts must not share the storage of the joined tensor.
            parts = (part.clone() for part in tensor.chunk(len(entry.names)))
            converted |= dict(zip(entry.names, parts, strict=False))
    return converted


def swap_halves(tensor: Tensor) -> Tensor:
    """Copy of ``tensor`` with the two halves of its first axis exchanged."""
    return torch.cat(tensor.chunk(2)[::-1]) if tensor.dim() else tensor


def original_names(entries: Iterable[TensorEntry]) -> dict[str, str]:
    """Name in the file by name in diffusers, for ``entries`` of one tensor each."""
    return {name: entry.original for entry in entries for name in entry.names}
