"""Distances between sets of embeddings: diversity, memorization, drift of the class prior."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


def distances(embeddings: Tensor) -> list[float]:
    """Mean cosine distance, in [0, 2], of each of ``embeddings`` [N, D] (unit length, N >= 2) to the others.

    The mean of the result is the diversity: 0 if all images are identical. Ruiz et al. 2023 (section 4.1, DIV) compute
    it with LPIPS instead.
    """
    count = len(embeddings)
    assert count >= 2
    products = embeddings @ embeddings.T
    means: list[float] = (1 - (products.sum(1) - products.diagonal()) / (count - 1)).tolist()
    return means


def nearest(images: Tensor, shown: Tensor) -> list[float]:
    """Cosine similarity, in [-1, 1], of each of ``images`` [N, D] to its nearest training image in ``shown`` [M, D].

    1 means a copy, as far as the embeddings can tell; Somepalli et al. 2023 (section 4) detect copies this way. A
    well-learned subject also has a high similarity, so read it together with ``diversity``.
    """
    similarities: list[float] = (images @ shown.T).amax(dim=1).tolist()
    return similarities


class _PrecomputedFeatures(nn.Identity):
    """Feature extractor for torchmetrics that returns its inputs, which are embeddings already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def prior_drift(ours: Tensor, base: Tensor) -> float:
    """Kernel distance of two sets of unit-length embeddings [N, D] and [M, D]; about 0 for the same distribution.

    Unbiased squared MMD with the kernel (cosine + 1)^3, as in KID (Binkowski et al. 2018, section 4), but with CLIP
    embeddings instead of Inception's: not comparable with published KID values. It can be slightly negative and is at
    most 16.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    width = ours.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # warns that all features stay in memory; they are few
        metric = KernelInceptionDistance(_PrecomputedFeatures(width), subsets=1, subset_size=min(len(ours), len(base)))
    # The kernel of torchmetrics divides dot products by the embedding width.
    metric.update(base.cpu() * width**0.5, real=True)
    metric.update(ours.cpu() * width**0.5, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # torchmetrics draws a subset of the larger set
        return float(metric.compute()[0])
