"""Distances between sets of embeddings: diversity, memorisation, drift of the class."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


def distances(embeddings: Tensor) -> list[float]:
    """Of each of ``embeddings`` [N, D] of unit length, N at least 2, the mean cosine distance to the others, in [0, 2].

    Their mean is the diversity, which Ruiz et al. 2022 (section 4.1, DIV) take of LPIPS: 0 where all images are one.
    """
    count = len(embeddings)
    assert count >= 2
    products = embeddings @ embeddings.T
    found: list[float] = (1 - (products.sum(1) - products.diagonal()) / (count - 1)).tolist()
    return found


def nearest(images: Tensor, shown: Tensor) -> list[float]:
    """Of each of ``images`` [N, D] the greatest cosine to any of the training images ``shown`` [M, D], in [-1, 1].

    1 is a copy, as far as the embeddings see (Somepalli et al. 2023, section 4, who use it to find copies). A subject
    that is met well is near too, so read it beside ``diversity``.
    """
    found: list[float] = (images @ shown.T).amax(dim=1).tolist()
    return found


class _Given(nn.Identity):
    """An extractor for what is extracted already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def prior_drift(ours: Tensor, base: Tensor) -> float:
    """Kernel distance between two sets of embeddings [N, D] and [M, D] of unit length; 0 where they are of one kind.

    The unbiased squared MMD under the kernel (cosine + 1)^3, which is KID's (Binkowski et al. 2018, section 4) on
    embeddings of a CLIP in place of Inception's: not comparable with published KIDs. It may be a little below 0, and is
    at most 16.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    width = ours.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it keeps all features, which are few here
        metric = KernelInceptionDistance(_Given(width), subsets=1, subset_size=min(len(ours), len(base)))
    # Its kernel divides products by the width.
    metric.update(base.cpu() * width**0.5, real=True)
    metric.update(ours.cpu() * width**0.5, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # it draws a subset where one set is the larger
        return float(metric.compute()[0])
