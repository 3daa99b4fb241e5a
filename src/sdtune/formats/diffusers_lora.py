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
"""The name that ``load_lora_weights(folder)`` looks for."""

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_SETTINGS = "lora_adapter_metadata"

# peft's names, and those that diffusers' own training scripts give (diffusers.utils.convert_state_dict_to_diffusers).
_KEY = re.compile(
    r"(?P<module>(?:unet|text_encoder|text_encoder_2)\..+)\."
    r"(?:(?P<down>lora_A|lora\.down|lora_linear_layer\.down)|lora_B|lora\.up|lora_linear_layer\.up)\.weight"
)

# peft takes regular expressions here. One out of a stranger's file can run for ever, so only names are taken.
_Name = Annotated[str, StringConstraints(pattern=r"^\^?[\w.]+$")]


def to_tensors(weights: LoRAWeights) -> dict[str, Tensor]:
    """The tensors by file key. alpha is folded into B: this form has no place for it but an optional header."""
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in weights.folded().pairs.items():
        tensors[module + _DOWN], tensors[module + _UP] = down, up
    return tensors


def write(path: Path, weights: LoRAWeights, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32) -> None:
    """Writes ``path``, by custom a folder's ``FILE_NAME``, for any diffusers, old or new.

    Raises:
        UserError: ``path`` cannot be written.
    """
    # Settings carried over from a file that was read would scale the folded tensors a second time.
    kept = {key: value for key, value in metadata.items() if key != _SETTINGS}
    write_safetensors(path, {key: value.to(dtype) for key, value in to_tensors(weights).items()}, kept)


def parse(source: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> LoRAWeights:
    """The weights in what was read from ``source``; alpha from diffusers' ``lora_adapter_metadata``, else alpha = r.

    Raises:
        UserError: a tensor or a setting that is not plain LoRA for SD's UNet or text encoder.
    """
    written: dict[str, str] = {}
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        module = canonical(match["module"])
        written[module] = match["module"]
        (downs if match["down"] else ups)[module] = tensor
    if strange:
        raise UserError(
            f"{source}: {few(strange)}: not read; plain LoRA of 'unet', 'text_encoder' and 'text_encoder_2' is"
        )
    weights = assemble_pairs(source, downs, ups, {})
    settings = _settings(source, metadata, {module.partition(".")[0] for module in downs})
    if not settings:
        return weights
    alphas: dict[str, float] = {}
    for module, full_name in written.items():
        # The settings' patterns speak of the names as written, with or without `text_model.`.
        component, _, name = full_name.partition(".")
        alphas[module] = settings[component].alpha(name, weights.rank(module))
    return LoRAWeights(weights.pairs, alphas)


class _Settings(BaseModel):
    """The fields of peft's LoraConfig on which the scale depends; the ranks show in the tensors' shapes."""

    model_config = ConfigDict(strict=True)

    lora_alpha: FiniteFloat
    alpha_pattern: dict[_Name, FiniteFloat] | None = None
    use_rslora: bool = False
    use_dora: Literal[False] = False

    def alpha(self, name: str, rank: int) -> float:
        """alpha of the module ``name``, without its component, such that its scale is alpha / rank.

        A pattern speaks of the modules whose name ends in it, one with ``^`` of that one module; the first that fits
        counts (peft.utils.other.get_pattern_key).
        """
        patterns = self.alpha_pattern or {}
        fits = (key for key in patterns if key == f"^{name}" or f".{name}".endswith(f".{key}"))
        key = next(fits, None)
        alpha = self.lora_alpha if key is None else patterns[key]
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def _settings(source: Path, metadata: Mapping[str, str], components: Iterable[str]) -> dict[str, _Settings]:
    """Of each of ``components``, from keys such as ``unet.lora_alpha``; empty if the file has no settings at all."""
    text = metadata.get(_SETTINGS)
    if text is None:
        return {}
    try:
        fields = TypeAdapter(dict[str, Any]).validate_json(text)
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
            f"{source}: {where}: {first['msg']}; plain LoRA's settings, with each component's lora_alpha "
            "and patterns by module name, are read"
        ) from error
