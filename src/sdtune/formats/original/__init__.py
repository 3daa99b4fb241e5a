"""The original single-file layout of Stable Diffusion (CompVis, Stability AI), which ComfyUI and A1111 read."""

from sdtune.formats.original.checkpoint import Family, Models, detect, join, split

__all__ = ["Family", "Models", "detect", "join", "split"]
