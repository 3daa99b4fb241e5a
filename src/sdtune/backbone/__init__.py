"""A pretrained Stable Diffusion, shared by all methods and frozen unless a method opens a part."""

from sdtune.backbone.pretrained import Component, Facts, Pretrained

__all__ = ["Component", "Facts", "Pretrained"]
