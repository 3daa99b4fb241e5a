"""Read and write the weight files of other programs: tensors and their names, not models."""

from sdtune.formats import diffusers_lora, kohya_lora
from sdtune.formats.files import read_safetensors, write_safetensors
from sdtune.formats.kohya_lora import ModelNames, ModelSpec
from sdtune.formats.kohya_names import KohyaModule, KohyaTable
from sdtune.formats.lora import LoRAWeights, canonical
from sdtune.formats.read import largest_rank_in_file, read_lora

__all__ = [
    "KohyaModule",
    "KohyaTable",
    "LoRAWeights",
    "ModelNames",
    "ModelSpec",
    "canonical",
    "diffusers_lora",
    "kohya_lora",
    "largest_rank_in_file",
    "read_lora",
    "read_safetensors",
    "write_safetensors",
]
