"""sdtune: fine-tune Stable Diffusion in five ways, and find out by measurement which one serves."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdtune import pocket
    from sdtune.sampling.api import sample

__all__ = ["pocket", "sample"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the command line answers --help without it.
    if name == "sample":
        from sdtune.sampling.api import sample

        return sample
    if name == "pocket":
        return import_module("sdtune.pocket")
    raise AttributeError(f"module 'sdtune' has no attribute {name!r}")
