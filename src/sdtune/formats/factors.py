"""Low-rank factors of a weight difference, and reduction of rank, by singular value decomposition.

Eckart & Young 1936: cut after r singular values, a matrix is the nearest one of rank r.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdtune.formats.lora import LoRAWeights

_SMALLEST = 1e-6
"""Norm of a difference, against the weight's own, below which a module counts as unchanged."""


def extract(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], rank: int | None, energy: float | None
) -> tuple[LoRAWeights, dict[str, float]]:
    """The LoRA that turns ``base`` into about ``tuned``, with alpha = r.

    Args:
        tuned, base: weights by module path, canonical and with its component: [out, in], or [out, in, h, w].
        rank: at most so many; all that ``energy`` asks for if None.
        energy: the share of the squared singular values that is kept; all that ``rank`` allows if None.

    Returns:
        The weights, and the share of the squared difference that each module's pair keeps. Modules that have not
        changed have none.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    shares: dict[str, float] = {}
    for module, after in tuned.items():
        before = base[module].float()
        difference = after.float() - before
        if difference.norm() <= _SMALLEST * before.norm() or _rounded(after.float(), before):
            continue
        pairs[module], shares[module] = _factored(difference, rank, energy)
    return LoRAWeights(pairs, {module: float(down.shape[0]) for module, (down, _) in pairs.items()}), shares


def _rounded(after: Tensor, before: Tensor) -> bool:
    """Whether the two differ by no more than how they were kept: one of them in half precision."""
    return any(torch.equal(after.to(half), before.to(half)) for half in (torch.float16, torch.bfloat16))


def _factored(difference: Tensor, rank: int | None, energy: float | None) -> tuple[tuple[Tensor, Tensor], float]:
    matrix = difference.flatten(1)
    if energy is None and rank is not None and 4 * rank < min(matrix.shape):
        # Halko et al. 2011: a few times the wanted rank is enough, and takes a fraction of the time.
        left, values, right = torch.svd_lowrank(matrix, q=2 * rank + 8, niter=4)
        pair, _ = _cut(left, values, right.T, rank, None, difference.shape)
        return pair, float(values[:rank].square().sum() / matrix.square().sum())
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return _cut(left, values, right, rank, energy, difference.shape)


def reduce(weights: LoRAWeights, rank: int | None, energy: float | None) -> tuple[LoRAWeights, dict[str, float]]:
    """The same changes with fewer ranks; arguments and returns as of :func:`extract`."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    shares: dict[str, float] = {}
    for module, (down, up) in weights.folded().pairs.items():
        # Of B A, without ever making it: its singular values are those of a small r x r matrix between two bases.
        outer, upper = torch.linalg.qr(up.flatten(1))
        inner, lower = torch.linalg.qr(down.flatten(1).T)
        left, values, right = torch.linalg.svd(upper @ lower.T)
        shape = torch.Size((up.shape[0], *down.shape[1:]))
        pairs[module], shares[module] = _cut(outer @ left, values, right @ inner.T, rank, energy, shape)
    return LoRAWeights(pairs, {module: float(down.shape[0]) for module, (down, _) in pairs.items()}), shares


def _cut(
    left: Tensor, values: Tensor, right: Tensor, rank: int | None, energy: float | None, shape: torch.Size
) -> tuple[tuple[Tensor, Tensor], float]:
    """A and B, each with the root of the singular values, and the share of their squares that is kept."""
    shares = values.square().cumsum(0) / values.square().sum().clamp_min(torch.finfo(values.dtype).tiny)
    count = len(values) if energy is None else int((shares < energy).sum()) + 1
    count = max(1, min(count, len(values), rank or len(values)))
    roots = values[:count].sqrt()
    up, down = left[:, :count] * roots, roots[:, None] * right[:count]
    if len(shape) == 4:
        up, down = up[:, :, None, None], down.view(count, *shape[1:])
    return (down.contiguous(), up.contiguous()), float(shares[count - 1])
