"""Original single-file layout of Stable Diffusion (CompVis, Stability AI), as used by ComfyUI and A1111."""

from sdtune.formats.original.checkpoint import ComponentLayout, FileLayout, join, split
from sdtune.formats.original.table import TensorEntry

__all__ = ["ComponentLayout", "FileLayout", "TensorEntry", "join", "split"]
