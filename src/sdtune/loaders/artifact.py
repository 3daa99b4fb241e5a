"""What loaded LoRAs and ControlNets have in common."""

from __future__ import annotations

import logging
from dataclasses import dataclass

log = logging.getLogger("sdtune")


@dataclass(frozen=True)
class LoadedArtifact:
    """A trained file, read, that fits the backbone at hand; ``path`` is as the user named it."""

    path: str


def warn_of_another_backbone(name: str, trained_on: str, backbone_hash: str) -> None:
    """A warning where an artifact was trained on other weights: what was made from its backbone may suit it as well.

    Args:
        name: of the artifact, for the message.
        trained_on: the hash that it holds.
        backbone_hash: of the backbone at hand.
    """
    if trained_on != backbone_hash:
        log.warning(
            "%s: trained on another backbone (%s) than this one (%s): its images may be others than it learned",
            name,
            trained_on[:12],
            backbone_hash[:12],
        )
