"""Image generation: the sampling loop, prompt files, and :func:`sample`."""

from sdtune.sampling.api import sample
from sdtune.sampling.loop import Request, Sampling, generate

__all__ = ["Request", "Sampling", "generate", "sample"]
