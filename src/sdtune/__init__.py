"""sdtune: fine-tune Stable Diffusion with five methods and compare them by measurements."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdtune import pocket
    from sdtune.cli.python_api import plan, train
    from sdtune.commands.trained_run import TrainedRun
    from sdtune.sampling.api import sample

__all__ = ["TrainedRun", "plan", "pocket", "sample", "train"]

_MODULES = {
    "TrainedRun": "sdtune.commands.trained_run",
    "plan": "sdtune.cli.python_api",
    "sample": "sdtune.sampling.api",
    "train": "sdtune.cli.python_api",
}


def __getattr__(name: str) -> Any:
    # Lazy import: --help must not load torch and diffusers.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name == "pocket":
        return import_module("sdtune.pocket")
    raise AttributeError(f"module 'sdtune' has no attribute {name!r}")
