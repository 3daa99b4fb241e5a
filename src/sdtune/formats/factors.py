"""LoRA extraction from a weight difference, and rank reduction, by singular value decomposition (SVD).

Eckart & Young 1936: an SVD truncated after r singular values is the nearest matrix of rank r.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdtune.formats.lora import LoRAWeights

_UNCHANGED = 1e-6
"""Modules whose difference has at most this norm, relative to the norm of the weight, count as unchanged."""


def extract(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], rank: int | None, energy: float | None
) -> tuple[LoRAWeights, dict[str, float]]:
    """Extract a LoRA that approximates ``tuned - base``; alpha equals the rank.

    Args:
        tuned, base: weights by canonical module path with component: [out, in], or [out, in, h, w].
        rank: maximum rank; if None, only ``energy`` limits it.
        energy: minimum share of the squared singular values to keep; if None, only ``rank`` limits it.

    Returns:
        The weights, and the share of the squared difference that each module's pair keeps. Unchanged modules are
        omitted.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    shares: dict[str, float] = {}
    for module, tuned_weight in tuned.items():
        base_weight = base[module].float()
        difference = tuned_weight.float() - base_weight
        if difference.norm() <= _UNCHANGED * base_weight.norm() or _differs_by_rounding(
            tuned_weight.float(), base_weight
        ):
            continue
        pairs[module], shares[module] = _factorize(difference, rank, energy)
    return LoRAWeights(pairs, {module: float(down.shape[0]) for module, (down, _) in pairs.items()}), shares


def _differs_by_rounding(tuned_weight: Tensor, base_weight: Tensor) -> bool:
    """Whether the two differ only because one of them was stored in half precision."""
    return any(torch.equal(tuned_weight.to(dtype), base_weight.to(dtype)) for dtype in (torch.float16, torch.bfloat16))


def _factorize(difference: Tensor, rank: int | None, energy: float | None) -> tuple[tuple[Tensor, Tensor], float]:
    matrix = difference.flatten(1)
    if energy is None and rank is not None and 4 * rank < min(matrix.shape):
        # Randomized SVD (Halko et al. 2011): a small multiple of the target rank is sufficient, and much faster.
        left, values, right = torch.svd_lowrank(matrix, q=2 * rank + 8, niter=4)
        pair, _ = _truncate(left, values, right.T, rank, None, difference.shape)
        return pair, float(values[:rank].square().sum() / matrix.square().sum())
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return _truncate(left, values, right, rank, energy, difference.shape)


def reduce(weights: LoRAWeights, rank: int | None, energy: float | None) -> tuple[LoRAWeights, dict[str, float]]:
    """Reduce the rank of ``weights``; arguments and return values as in :func:`extract`."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    shares: dict[str, float] = {}
    for module, (down, up) in weights.folded().pairs.items():
        # SVD of B A without computing the product: QR of both factors reduces it to the SVD of an r x r matrix.
        outer, upper = torch.linalg.qr(up.flatten(1))
        inner, lower = torch.linalg.qr(down.flatten(1).T)
        left, values, right = torch.linalg.svd(upper @ lower.T)
        shape = torch.Size((up.shape[0], *down.shape[1:]))
        pairs[module], shares[module] = _truncate(outer @ left, values, right @ inner.T, rank, energy, shape)
    return LoRAWeights(pairs, {module: float(down.shape[0]) for module, (down, _) in pairs.items()}), shares


def _truncate(
    left: Tensor, values: Tensor, right: Tensor, rank: int | None, energy: float | None, shape: torch.Size
) -> tuple[tuple[Tensor, Tensor], float]:
    """A and B, each scaled by the root of the singular values, and the share of the squared values that is kept."""
    shares = values.square().cumsum(0) / values.square().sum().clamp_min(torch.finfo(values.dtype).tiny)
    kept_rank = len(values) if energy is None else int((shares < energy).sum()) + 1
    kept_rank = max(1, min(kept_rank, len(values), rank or len(values)))
    roots = values[:kept_rank].sqrt()
    up, down = left[:, :kept_rank] * roots, roots[:, None] * right[:kept_rank]
    if len(shape) == 4:
        up, down = up[:, :, None, None], down.view(kept_rank, *shape[1:])
    return (down.contiguous(), up.contiguous()), float(shares[kept_rank - 1])
