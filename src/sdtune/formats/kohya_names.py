"""Names of the modules of a model in LoRA files in kohya format, and modules that such files store as one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sdtune.errors import UserError
from sdtune.formats.lora import Hints, LoRAWeights
from sdtune.formats.original.table import swap_halves


@dataclass(frozen=True)
class KohyaModule:
    """One module of a kohya file.

    Attributes:
        paths: canonical paths of its modules in diffusers or transformers. The outputs of several modules are
            concatenated in the file, such as query, key and value.
        halves_swapped: whether the two halves of the output are exchanged in the file.
    """

    paths: tuple[str, ...]
    halves_swapped: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the file stores one module of diffusers as it is."""
        return len(self.paths) == 1 and not self.halves_swapped


@dataclass(frozen=True)
class KohyaTable:
    """Modules of a model by their names in kohya files.

    Attributes:
        modules: modules by the name that is written.
        alternatives: modules by other names that are read.
        hints: remedies for files of other models.
    """

    modules: Mapping[str, KohyaModule]
    alternatives: Mapping[str, KohyaModule] = field(default_factory=dict)
    hints: Hints = ()

    def __post_init__(self) -> None:
        paths = [path for module in self.modules.values() for path in module.paths]
        assert len(paths) == len(set(paths)), "a module of diffusers has several kohya names"
        assert all(self.modules.get(name, module) == module for name, module in self.alternatives.items())

    def paths(self) -> frozenset[str]:
        """Canonical paths of all modules."""
        return frozenset(path for module in self.modules.values() for path in module.paths)

    def module(self, name: str) -> KohyaModule | None:
        """The module that a file calls ``name``."""
        return self.modules.get(name) or self.alternatives.get(name)


def underscored(prefix: str, path: str) -> str:
    """kohya's name of the module ``path``: dots become underscores."""
    return prefix + path.replace(".", "_")


def plain_modules(paths: Collection[str], prefixes: Mapping[str, str]) -> dict[str, KohyaModule]:
    """Modules with kohya's names of the canonical ``paths``; ``prefixes`` of each component."""
    parts = (path.partition(".") for path in paths)
    names = {
        underscored(prefixes[component], path): KohyaModule((f"{component}.{path}",)) for component, _, path in parts
    }
    assert len(names) == len(paths), "two modules have the same kohya name"
    return names


def fused(weights: LoRAWeights, table: KohyaTable) -> LoRAWeights:
    """``weights``, which have one alpha, by kohya's module names, with the same changes of the weights.

    Of a module with several parts, A is the concatenation of all A [r1 + r2 + ..., in], and B is block-diagonal
    [out1 + out2 + ..., r1 + r2 + ...], with zeros for a part without a pair. Its alpha / r is that of the first part.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    alphas: dict[str, float] = {}
    remaining = set(weights.pairs)
    for name, module in table.modules.items():
        present = [path for path in module.paths if path in weights.pairs]
        if not present:
            continue
        remaining -= set(present)
        first = present[0]
        down, up = _join(weights, module, present) if len(module.paths) > 1 else weights.pairs[first]
        pairs[name] = down, swap_halves(up) if module.halves_swapped else up
        alphas[name] = weights.alphas[first] * (down.shape[0] / weights.rank(first))
    assert not remaining, f"no kohya name for {sorted(remaining)[0]}"
    return LoRAWeights(pairs, alphas)


def _join(weights: LoRAWeights, module: KohyaModule, present: Sequence[str]) -> tuple[Tensor, Tensor]:
    """A and B of ``module``, with the scale alpha / r of its first pair."""
    first_up, first_rank = weights.pairs[present[0]][1], weights.rank(present[0])
    down = torch.cat([weights.pairs[path][0] for path in present])
    blocks: list[Tensor] = []
    column = 0
    for path in module.paths:
        block = first_up.new_zeros(len(first_up), len(down))
        if path in weights.pairs:
            up, rank = weights.pairs[path][1], weights.rank(path)
            assert len(up) == len(first_up), f"{path}: the parts of a module differ in size"
            block[:, column : column + rank] = up * (first_rank / rank)
            column += rank
        blocks.append(block)
    return down, torch.cat(blocks)


def separated(source: Path, weights: LoRAWeights, modules: Mapping[str, KohyaModule]) -> LoRAWeights:
    """The inverse of :func:`fused`: ``weights`` read from ``source`` by canonical path.

    Args:
        source: path of the file, for error messages.
        weights: pairs by the keys of ``modules``, or by canonical path.
        modules: modules that the file stores in another form.

    Raises:
        UserError: a joined module cannot be divided into its parts.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, (down, up) in weights.pairs.items():
        module = modules.get(name, KohyaModule((name,)))
        if up.shape[0] % (2 if module.halves_swapped else len(module.paths)):
            raise UserError(
                f"{source}: {name}: cannot divide {up.shape[0]} rows into {', '.join(module.paths)}",
                remedy="use the backbone of its training",
            )
        restored = swap_halves(up) if module.halves_swapped else up
        parts = restored.tensor_split(len(module.paths)) if len(module.paths) > 1 else (restored,)
        for path, pair in zip(module.paths, _pairs(down, *parts), strict=True):
            if pair is not None:
                pairs[path], alphas[path] = pair, weights.alphas[name]
                if pair[0].shape != down.shape:  # alpha / r stays the same
                    alphas[path] *= pair[0].shape[0] / down.shape[0]
    return LoRAWeights(pairs, alphas)


def _pairs(down: Tensor, *ups: Tensor) -> Iterator[tuple[Tensor, Tensor] | None]:
    """Pair of each part of a joined module, without the columns of B that are zero; None if all are."""
    if len(ups) == 1:
        yield down, ups[0]
        return
    is_untrained = not any(up.any() for up in ups)
    for up in ups:
        used = torch.ones_like(down[:, 0], dtype=torch.bool) if is_untrained else up.any(dim=0)
        # Indexing copies, so that the parts do not share storage.
        yield (down[used], up[:, used]) if used.any() else None
