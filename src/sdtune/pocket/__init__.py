"""Pocket: the small Stable Diffusion that ships with sdtune, its image world, and the recipe that trained it."""

from sdtune.paths import pocket_clip as clip_path
from sdtune.paths import pocket_pipeline as path

__all__ = ["clip_path", "path"]
