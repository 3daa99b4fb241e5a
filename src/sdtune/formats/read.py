"""Read a LoRA file in the formats of diffusers and kohya, also with the names of peft, ai-toolkit and OneTrainer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sdtune.errors import UserError
from sdtune.formats import diffusers_lora, kohya_lora
from sdtune.formats.files import read_safetensors, read_shapes
from sdtune.formats.kohya_names import KohyaTable
from sdtune.formats.lora import LoRAWeights, unknown_modules
from sdtune.formats.lora_names import usual_names, without_bundled_embeddings

_DOWN = re.compile(r"(lora_A|lora[._]down|lora_linear_layer\.down)(\.default)?\.weight$")
"""End of the name of an A matrix in every known format."""


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file with these tensor names contains a LoRA, in diffusers or kohya format."""
    return any(key.startswith("lora_") or ".lora" in key or "_lora." in key for key in keys)


def largest_rank_in_file(path: Path) -> int:
    """Largest LoRA rank in the file ``path``, read from the tensor shapes in its header; 1 if it has no LoRA pair.

    Raises:
        UserError: the file is missing or not in safetensors format.
    """
    shapes = read_shapes(_lora_file(path))
    return max((shape[0] for key, shape in shapes.items() if shape and _DOWN.search(key)), default=1)


def read_lora(path: Path, table: KohyaTable) -> tuple[LoRAWeights, dict[str, str]]:
    """LoRA weights and header metadata of ``path``.

    Args:
        path: a file, or a folder with a LoRA file of diffusers.
        table: the modules that a LoRA may target, with their kohya names.

    Raises:
        UserError: the file is missing, not a LoRA in diffusers or kohya format, or targets modules not in ``table``.
    """
    file = _lora_file(path)
    content, metadata = read_safetensors(file)
    tensors = usual_names(without_bundled_embeddings(content)[0])
    if any(key.startswith("lora_") for key in tensors):
        return kohya_lora.parse(file, tensors, table), metadata
    if not is_lora(tensors):
        raise UserError(
            f"{file}: not a LoRA", remedy="use pytorch_lora_weights.safetensors of diffusers, or a file in kohya format"
        )
    weights = diffusers_lora.parse(file, tensors, metadata)
    if unknown := weights.pairs.keys() - table.paths():
        raise unknown_modules(file, unknown, table.hints)
    return weights, metadata


def _lora_file(path: Path) -> Path:
    return path / diffusers_lora.FILE_NAME if path.is_dir() else path
