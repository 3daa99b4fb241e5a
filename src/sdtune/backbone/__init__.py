"""Pretrained Stable Diffusion models: file lookup, model family, loading, encoding, prediction and decoding."""

from sdtune.backbone.families import Component, Facts
from sdtune.backbone.pretrained import Pretrained

__all__ = ["Component", "Facts", "Pretrained"]
