"""Pocket, the small Stable Diffusion that ships with sdtune: measured, trained, and the image world behind it."""

from sdtune.paths import pocket_clip as clip_path
from sdtune.paths import pocket_pipeline as path

__all__ = ["clip_path", "path"]
