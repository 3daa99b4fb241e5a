"""How far the class has moved from what the base model draws of it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


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
