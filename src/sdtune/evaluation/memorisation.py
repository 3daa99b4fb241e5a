"""Has it learned the subject, or the pictures?"""

from __future__ import annotations

from torch import Tensor


def nearest(pictures: Tensor, shown: Tensor) -> list[float]:
    """Of each of ``pictures`` [N, D] the greatest cosine to any of the training pictures ``shown`` [M, D], in [-1, 1].

    1 is a copy, as far as the embeddings see (Somepalli et al. 2023, section 4, who use it to find copies). A subject
    that is met well is near too, so read it beside ``diversity``.
    """
    found: list[float] = (pictures @ shown.T).amax(dim=1).tolist()
    return found
