"""How different pictures of one thing are from each other."""

from __future__ import annotations

from torch import Tensor


def diversity(embeddings: Tensor) -> float:
    """Mean cosine distance, in [0, 2], between any two of ``embeddings`` [N, D] of unit length, N at least 2.

    As Ruiz et al. 2022 (section 4.1, DIV) measure with LPIPS: 0 where all pictures are one.
    """
    count = len(embeddings)
    assert count >= 2
    products = embeddings @ embeddings.T
    return float(1 - (products.sum() - products.diagonal().sum()) / (count * (count - 1)))
