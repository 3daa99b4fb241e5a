"""A pretrained Stable Diffusion, shared by all methods and frozen unless a method opens a part."""

from sdtune.backbone.families import Component, Facts
from sdtune.backbone.pretrained import Pretrained

__all__ = ["Component", "Facts", "Pretrained"]
