"""sdtune: fine-tune Stable Diffusion with five methods and compare them by measurements."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdtune import pocket
    from sdtune.sampling.api import sample

__all__ = ["pocket", "sample"]


def __getattr__(name: str) -> Any:
    # Lazy import: --help must not load torch and diffusers.
    if name == "sample":
        from sdtune.sampling.api import sample

        return sample
    if name == "pocket":
        return import_module("sdtune.pocket")
    raise AttributeError(f"module 'sdtune' has no attribute {name!r}")
