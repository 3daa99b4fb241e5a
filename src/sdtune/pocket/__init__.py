"""Pocket, the small Stable Diffusion that ships with sdtune: paths, pretraining, synthetic images and evaluation."""

from sdtune.paths import pocket_clip as clip_path
from sdtune.paths import pocket_pipeline as path

__all__ = ["clip_path", "path"]
