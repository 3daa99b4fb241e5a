"""Base class of loaded LoRAs and ControlNets, and a warning for artifacts of another backbone."""

from __future__ import annotations

import logging
from dataclasses import dataclass

log = logging.getLogger("sdtune")


@dataclass(frozen=True)
class LoadedArtifact:
    """A trained file that was read and fits the backbone; ``path`` is the path that the user set."""

    path: str


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
