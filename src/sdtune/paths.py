"""Paths: the shipped configs, the pocket backbone, the cache that runs share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_POCKET = Path(__file__).parent / "pocket"


def config_folder() -> Path:
    """The folder of Hydra groups: beside the package in a wheel, at the top of a checkout."""
    packaged = Path(__file__).parent / "conf"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"
    assert folder.is_dir(), folder
    return folder


def cache_folder() -> Path:
    """``$SDTUNE_CACHE``, else ``sdtune`` in the user's cache folder; holds hashes, latents and text states."""
    named = os.environ.get("SDTUNE_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdtune"


def command_line_folder(sources: Iterable[Any]) -> str | None:
    """The ``--config-dir`` among Hydra's config ``sources``."""
    return next((str(source.path) for source in sources if source.provider == "command-line"), None)


def pocket_pipeline() -> Path:
    """The pipeline folder of the shipped backbone, in the diffusers layout."""
    return _POCKET / "models" / "pipeline"


def pocket_clip() -> Path:
    """The folder of the CLIP whose text tower is the shipped backbone's text encoder."""
    return _POCKET / "models" / "clip"


def pocket_art() -> Path:
    """The folder of the drawings that the image world is made of, a folder for each style."""
    return _POCKET / "art"


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form USER/NAME, and so can be one where no local file or folder has it."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~"))
