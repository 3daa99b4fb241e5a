"""Original single-file layout of Stable Diffusion (CompVis, Stability AI), as used by ComfyUI and A1111."""

from sdtune.formats.original.checkpoint import Family, Models, detect, join, split

__all__ = ["Family", "Models", "detect", "join", "split"]
