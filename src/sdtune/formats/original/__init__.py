"""Original single-file layout of Stable Diffusion (CompVis, Stability AI), as used by ComfyUI and A1111."""

from sdtune.formats.original.checkpoint import ComponentLayout, Layout, join, split
from sdtune.formats.original.table import Entry

__all__ = ["ComponentLayout", "Entry", "Layout", "join", "split"]
