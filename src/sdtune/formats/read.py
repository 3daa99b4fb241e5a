"""Read a LoRA file in the diffusers or kohya format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdtune.errors import UserError
from sdtune.formats import diffusers_lora, kohya_lora
from sdtune.formats.files import read_safetensors
from sdtune.formats.lora import LoRAWeights, few


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file with tensors of these names holds a LoRA, of either form."""
    return any(key.startswith("lora_") or ".lora" in key for key in keys)


def read_lora(
    path: Path, modules: Iterable[str], xl: Mapping[str, Any] | None = None
) -> tuple[LoRAWeights, dict[str, str]]:
    """The weights and the header's metadata of ``path``: a file, or a folder with diffusers' file in it.

    Args:
        path: where.
        modules: every module path, canonical and with its component, that an adapter may name.
        xl: SDXL's UNet config where the backbone is SDXL.

    Raises:
        UserError: no such file, neither form, or modules that are not among ``modules``.
    """
    file = path / diffusers_lora.FILE_NAME if path.is_dir() else path
    tensors, metadata = read_safetensors(file)
    if any(key.startswith("lora_") for key in tensors):
        return kohya_lora.parse(file, tensors, modules, xl), metadata
    if not is_lora(tensors):
        raise UserError(f"{file}: not a LoRA; diffusers' pytorch_lora_weights.safetensors or kohya's form is expected")
    weights = diffusers_lora.parse(file, tensors, metadata)
    if unknown := weights.pairs.keys() - set(modules):
        raise UserError(
            f"{file}: {few(unknown)}: no such module in this backbone", remedy="use the adapter's own backbone"
        )
    return weights, metadata
