"""LoRA weights by module path: the common representation of all file formats."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdtune.errors import UserError

CLIP_ENCODERS = ("text_encoder", "text_encoder_2")
"""Components that are CLIP text encoders."""

Hints = Sequence[tuple[str, str]]
"""Regular expressions for module names that only other models have, each with the remedy."""


def canonical(module: str) -> str:
    """``module`` with ``text_model.`` after a text encoder component, as in all files.

    transformers >= 5.6 omits it from the module names of ``CLIPTextModel``.
    """
    component, _, path = module.partition(".")
    if component in CLIP_ENCODERS and path and not path.startswith(("text_model.", "text_projection")):
        return f"{component}.text_model.{path}"
    return module


@dataclass(frozen=True)
class LoRAWeights:
    """LoRA pairs: the weight of a module changes by alpha / r * B A (Hu et al. 2021, section 4.1).

    Attributes:
        pairs: by full diffusers module path with component, such as ``unet....`` or ``text_encoder.text_model....``
            (see :func:`canonical`): A [r, in] and B [out, r]; for convolutions A [r, in, h, w] and B [out, r, 1, 1].
        alphas: alpha by the same paths; for rsLoRA (Kalajdzievski 2023, scale alpha / sqrt(r)) alpha * sqrt(r).
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    alphas: dict[str, float]

    def __post_init__(self) -> None:
        assert self.pairs.keys() == self.alphas.keys(), "pairs and alphas name different modules"
        for module, (down, up) in self.pairs.items():
            assert canonical(module) == module, module
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


def unknown_modules(source: Path, names: Collection[str], hints: Hints) -> UserError:
    """The error for a LoRA file ``source`` that targets modules which the backbone does not have.

    Args:
        source: path of the file.
        names: these modules, as the file names them.
        hints: remedies for files of other models.
    """
    remedies = (remedy for pattern, remedy in hints if any(re.search(pattern, name) for name in names))
    return UserError(
        f"{source}: unknown target modules: {few(names, 1)}",
        remedy=next(remedies, "use the backbone of its training"),
    )


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
