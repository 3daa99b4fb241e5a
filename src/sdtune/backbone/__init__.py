"""A pretrained model: where its files are, which family it is, how it is loaded, what it computes."""

from sdtune.backbone.families import Component, Facts
from sdtune.backbone.pretrained import Pretrained

__all__ = ["Component", "Facts", "Pretrained"]
