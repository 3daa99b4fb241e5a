"""LoRA weights by module path: the common representation of all file formats."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdtune.errors import UserError

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def canonical(module: str) -> str:
    """``module`` with ``text_model.`` after a text encoder component, as in all files.

    transformers >= 5.6 omits it from the module names of ``CLIPTextModel``.
    """
    component, _, path = module.partition(".")
    if component in _TEXT_ENCODERS and path and not path.startswith(("text_model.", "text_projection")):
        return f"{component}.text_model.{path}"
    return module


@dataclass(frozen=True)
class LoRAWeights:
    """LoRA pairs: the weight of a module changes by alpha / r * B A (Hu et al. 2021, section 4.1).

    Attributes:
        pairs: by full diffusers module path with component, ``unet....`` or ``text_encoder.text_model....`` (see
            :func:`canonical`): A [r, in] and B [out, r]; for convolutions A [r, in, h, w] and B [out, r, 1, 1].
        alphas: alpha by the same paths; for rsLoRA (Kalajdzievski 2023, scale alpha / sqrt(r)) alpha * sqrt(r).
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    alphas: dict[str, float]

    def __post_init__(self) -> None:
        assert self.pairs.keys() == self.alphas.keys(), "pairs and alphas name different modules"
        for module, (down, up) in self.pairs.items():
            assert module.startswith("unet.") or canonical(module) == module, module
            assert _is_pair(down, up), f"{module}: {tuple(down.shape)} and {tuple(up.shape)}"

    def rank(self, module: str) -> int:
        """Rank r of ``module``."""
        return self.pairs[module][0].shape[0]

    def folded(self) -> LoRAWeights:
        """The same weight changes with alpha = r, hence scale 1, in float32."""
        return self._rescaled({module: float(self.rank(module)) for module in self.pairs})

    def uniform(self) -> LoRAWeights:
        """The same weight updates with one alpha for all modules: the common alpha, else the largest rank."""
        if len(set(self.alphas.values())) <= 1:
            return self
        largest = float(max(self.rank(module) for module in self.pairs))
        return self._rescaled(dict.fromkeys(self.pairs, largest))

    def _rescaled(self, alphas: dict[str, float]) -> LoRAWeights:
        return LoRAWeights(
            {
                module: (down.float(), up.float() * (self.alphas[module] / alphas[module]))
                for module, (down, up) in self.pairs.items()
            },
            alphas,
        )


def assemble_pairs(
    source: Path, downs: Mapping[str, Tensor], ups: Mapping[str, Tensor], alphas: Mapping[str, float]
) -> LoRAWeights:
    """LoRA weights read from ``source``: A, B and alpha by canonical module path; alpha = r if missing.

    Raises:
        UserError: a low-rank matrix is missing, shapes do not match, or alpha is not finite.
    """
    incomplete = (downs.keys() ^ ups.keys()) | (alphas.keys() - downs.keys())
    if incomplete:
        raise UserError(f"{source}: {few(incomplete)}: a low-rank matrix is missing; each module needs both, A and B")
    for module, down in downs.items():
        up = ups[module]
        if not _is_pair(down, up):
            raise UserError(
                f"{source}: {few([module])}: shapes {list(down.shape)} and {list(up.shape)} are not a low-rank pair",
                remedy="expected [r, in] and [out, r], or [r, in, h, w] and [out, r, 1, 1]",
            )
        if not math.isfinite(alphas.get(module, 0.0)):
            raise UserError(f"{source}: {few([module])}: alpha must be a finite number, got {alphas[module]}")
    return LoRAWeights(
        {module: (down, ups[module]) for module, down in downs.items()},
        {module: alphas.get(module, float(down.shape[0])) for module, down in downs.items()},
    )


def unknown_modules(source: Path, names: Collection[str], is_sdxl: bool) -> UserError:
    """The error for a LoRA file ``source`` that targets modules which the backbone does not have.

    Args:
        names: these modules, as the file names them.
        is_sdxl: whether the backbone is SDXL.
    """
    is_for_sdxl = not is_sdxl and any(part in name for name in names for part in _SDXL_PARTS)
    return UserError(
        f"{source}: unknown target modules: {few(names, 1)}",
        remedy="use an SDXL backbone, such as backbone=sdxl" if is_for_sdxl else "use the backbone of its training",
    )


_SDXL_PARTS = (
    "text_encoder_2",
    "lora_te2_",
    "lora_unet_input_blocks",
    "lora_unet_output_blocks",
    ".transformer_blocks.9.",
)
"""Parts of module names that only SDXL has."""


def few(names: Collection[str], shown: int = 3) -> str:
    """The first of the sorted ``names`` and the number of the others, for error messages.

    Names can come from untrusted files, so line breaks and control characters are escaped.
    """
    first = ", ".join(repr(name)[1:-1] for name in sorted(names)[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"


def _is_pair(down: Tensor, up: Tensor) -> bool:
    return (
        down.is_floating_point()
        and up.is_floating_point()
        and down.dim() == up.dim()
        and down.dim() in (2, 4)
        and 0 < down.shape[0] == up.shape[1]
        and all(size == 1 for size in up.shape[2:])
    )
