"""Pocket: the small Stable Diffusion that ships with sdtune, its picture world, and the recipe that trained it."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The pipeline folder of the shipped backbone, in the diffusers layout."""
    return Path(__file__).parent / "models" / "pipeline"


def clip_path() -> Path:
    """The folder of the CLIP whose text tower is the backbone's text encoder."""
    return Path(__file__).parent / "models" / "clip"
