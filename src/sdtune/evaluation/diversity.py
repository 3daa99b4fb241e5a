"""How different pictures of one thing are from each other."""

from __future__ import annotations

from torch import Tensor


def distances(embeddings: Tensor) -> list[float]:
    """Of each of ``embeddings`` [N, D] of unit length, N at least 2, the mean cosine distance to the others, in [0, 2].

    Their mean is the diversity, which Ruiz et al. 2022 (section 4.1, DIV) take of LPIPS: 0 where all pictures are one.
    """
    count = len(embeddings)
    assert count >= 2
    products = embeddings @ embeddings.T
    found: list[float] = (1 - (products.sum(1) - products.diagonal()) / (count - 1)).tolist()
    return found
