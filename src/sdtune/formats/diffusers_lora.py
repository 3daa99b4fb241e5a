"""LoRA files in the diffusers format: ``<component>.<module path>.lora_A.weight`` and ``.lora_B.weight``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, StringConstraints, TypeAdapter, ValidationError
from torch import Tensor

from sdtune.errors import UserError
from sdtune.formats.files import write_safetensors
from sdtune.formats.lora import LoRAWeights, assemble_pairs, canonical, few

FILE_NAME = "pytorch_lora_weights.safetensors"
"""File name that ``load_lora_weights(folder)`` expects."""

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_SETTINGS = "lora_adapter_metadata"

# Names of peft and of diffusers' training scripts (diffusers.utils.convert_state_dict_to_diffusers).
_KEY = re.compile(
    r"(?P<module>(?:unet|transformer|text_encoder|text_encoder_2|text_encoder_3)\..+)\."
    r"(?:(?P<down>lora_A|lora\.down|lora_linear_layer\.down)|lora_B|lora\.up|lora_linear_layer\.up)\.weight"
)

# peft accepts regular expressions here. One from an untrusted file could run forever, so only names are accepted.
_Name = Annotated[str, StringConstraints(pattern=r"^\^?[\w.]+$")]


def to_tensors(weights: LoRAWeights) -> dict[str, Tensor]:
    """Tensors by file key, with alpha folded into B: this format stores alpha only in an optional header."""
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in weights.folded().pairs.items():
        tensors[module + _DOWN], tensors[module + _UP] = down, up
    return tensors


def write(path: Path, weights: LoRAWeights, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32) -> None:
    """Write ``path``, by convention :data:`FILE_NAME` in a folder, for all releases of diffusers.

    Raises:
        UserError: ``path`` cannot be written.
    """
    # Drop adapter settings copied from another file: they would scale the folded tensors a second time.
    own_metadata = {key: value for key, value in metadata.items() if key != _SETTINGS}
    write_safetensors(path, {key: value.to(dtype) for key, value in to_tensors(weights).items()}, own_metadata)


def parse(source: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> LoRAWeights:
    """LoRA weights in ``tensors`` read from ``source``; alpha from ``lora_adapter_metadata``, else alpha = r.

    Raises:
        UserError: a tensor or a setting is not that of a plain LoRA of the denoiser or a text encoder.
    """
    names_in_file: dict[str, str] = {}
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    unsupported: list[str] = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            unsupported.append(key)
            continue
        module = canonical(match["module"])
        names_in_file[module] = match["module"]
        (downs if match["down"] else ups)[module] = tensor
    if unsupported:
        denoiser = "transformer" if any(key.startswith("transformer.") for key in tensors) else "unet"
        raise UserError(
            f"{source}: unsupported tensors: {few(unsupported)}",
            remedy=f"use a plain LoRA of {denoiser}, text_encoder or text_encoder_2",
        )
    weights = assemble_pairs(source, downs, ups, {})
    settings = _settings(source, metadata, {module.partition(".")[0] for module in downs})
    if not settings:
        return weights
    alphas: dict[str, float] = {}
    for module, name_in_file in names_in_file.items():
        # The patterns in the settings match names as in the file, with or without `text_model.`.
        component, _, name = name_in_file.partition(".")
        alphas[module] = settings[component].alpha(name, weights.rank(module))
    return LoRAWeights(weights.pairs, alphas)


class _Settings(BaseModel):
    """Fields of peft's LoraConfig that determine the scale; ranks follow from the tensor shapes."""

    model_config = ConfigDict(strict=True)

    lora_alpha: FiniteFloat
    alpha_pattern: dict[_Name, FiniteFloat] | None = None
    use_rslora: bool = False
    use_dora: Literal[False] = False

    def alpha(self, name: str, rank: int) -> float:
        """alpha of the module ``name`` (without component), such that its scale is alpha / rank.

        A pattern matches the modules whose name ends in it, a pattern with ``^`` only the module of exactly that name;
        the first match is used (peft.utils.other.get_pattern_key).
        """
        patterns = self.alpha_pattern or {}
        matches = (key for key in patterns if key == f"^{name}" or f".{name}".endswith(f".{key}"))
        key = next(matches, None)
        alpha = self.lora_alpha if key is None else patterns[key]
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def _settings(source: Path, metadata: Mapping[str, str], components: Iterable[str]) -> dict[str, _Settings]:
    """Settings of each of ``components``, from keys such as ``unet.lora_alpha``; empty if the file has no settings."""
    settings_json = metadata.get(_SETTINGS)
    if settings_json is None:
        return {}
    try:
        fields = TypeAdapter(dict[str, Any]).validate_json(settings_json)
        return {
            component: _Settings.model_validate(
                {
                    key.removeprefix(f"{component}."): value
                    for key, value in fields.items()
                    if key.startswith(f"{component}.")
                }
            )
            for component in components
        }
    except ValidationError as error:
        first = error.errors()[0]
        where = few([".".join(map(str, (_SETTINGS, *first["loc"])))])
        raise UserError(
            f"{source}: {where}: {first['msg']}",
            remedy="use plain LoRA settings: lora_alpha of each component, alpha_pattern by module name",
        ) from error
