"""Base classes of the artifacts that sampling loads onto a backbone: LoRAs, new words, ControlNets."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.pretrained import Pretrained
from sdtune.errors import UserError

log = logging.getLogger("sdtune")


class ArtifactFile(ABC):
    """A trained file or folder that the user names, with the settings of its use."""

    @abstractmethod
    def check(self, source: Pretrained, key: str) -> None:
        """Check the file for the backbone ``source``, without loading weights.

        Raises:
            UserError: it is missing, damaged, or does not fit; ``key`` is the config key of this entry.
        """

    @abstractmethod
    def load(self, backbone: Backbone, source: Pretrained) -> list[LoadedArtifact]:
        """Read the weights; the backbone is not changed.

        Raises:
            UserError: the weights do not fit the backbone.
        """

    def conditions(self, size: tuple[int, int]) -> Mapping[str, np.ndarray]:
        """Conditions of each request for images of ``size`` (width, height), by name; none by default."""
        return {}


@dataclass(frozen=True)
class LoadedArtifact(ABC):
    """A trained file that was read and fits the backbone.

    Args:
        path: the path that the user set.
        strength: the strength that the user set.
    """

    replaces_denoiser: ClassVar[bool] = False
    """Whether weights of the denoiser are replaced; only one applied artifact can do that."""

    path: str
    strength: float

    @abstractmethod
    def applied(
        self, backbone: Backbone, factor: float = 1.0, *, only_to_draw: bool = False
    ) -> AbstractContextManager[None]:
        """Context manager that applies the artifact to ``backbone``, and restores the original weights exactly.

        Args:
            factor: factor on the strength.
            only_to_draw: whether the weights are used only to generate images.
        """


@contextmanager
def artifacts_applied(
    backbone: Backbone, artifacts: Sequence[LoadedArtifact], factor: float = 1.0, *, only_to_draw: bool = False
) -> Iterator[None]:
    """Context manager that applies all ``artifacts`` in their order.

    Raises:
        UserError: more than one of them replaces weights of the denoiser.
    """
    replacing = [artifact for artifact in artifacts if artifact.replaces_denoiser and artifact.strength * factor]
    if len(replacing) > 1:
        raise UserError(
            f"both {replacing[0].path} and {replacing[1].path} contain weights of the denoiser",
            key="control",
            remedy="use only one of them",
        )
    with ExitStack() as stack:
        for artifact in artifacts:
            stack.enter_context(artifact.applied(backbone, factor, only_to_draw=only_to_draw))
        yield


def warn_if_other_backbone(name: str, trained_on: str, backbone_hash: str) -> None:
    """Log a warning if an artifact was trained on another backbone. No error: related backbones are often compatible.

    Args:
        name: name of the artifact in the message.
        trained_on: hash of the backbone that it was trained on.
        backbone_hash: hash of the current backbone.
    """
    if trained_on != backbone_hash:
        log.warning(
            "%s: trained on another backbone (%s) than this one (%s); its images may differ from those of the training",
            name,
            trained_on[:12],
            backbone_hash[:12],
        )
