"""Paths of the shipped configs, the pocket backbone and the cache that all runs share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdtune.errors import UserError

_POCKET = Path(__file__).parent / "pocket"


def config_folder() -> Path:
    """Folder of the Hydra config groups: ``sdtune/conf`` in a wheel, ``conf`` in a checkout."""
    packaged = Path(__file__).parent / "conf"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"
    assert folder.is_dir(), folder
    return folder


def cache_folder() -> Path:
    """Folder of cached hashes, latents and text embeddings: ``$SDTUNE_CACHE``, else ``sdtune`` in the user's cache.

    The folder is created if missing.

    Raises:
        UserError: it cannot be created or written.
    """
    remedy = "set the environment variable SDTUNE_CACHE to a writable folder"
    configured, shared = os.environ.get("SDTUNE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(configured).expanduser() if configured else Path(shared or Path.home() / ".cache") / "sdtune"
    except RuntimeError as error:  # a user without an entry in the system's list, as in some containers
        raise UserError(f"there is no cache folder ({error})", key="SDTUNE_CACHE", remedy=remedy) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(folder, os.W_OK) else "not writable"
    except OSError as error:
        problem = str(error.strerror)
    if problem is not None:
        raise UserError(f"the cache folder {folder} cannot be used ({problem})", remedy=remedy)
    return folder


def command_line_folder(sources: Iterable[Any]) -> str | None:
    """The ``--config-dir`` in Hydra's config ``sources``; None if it is not set."""
    return next((str(source.path) for source in sources if source.provider == "command-line"), None)


def pocket_pipeline() -> Path:
    """Pipeline folder of the shipped pocket backbone, in the diffusers layout."""
    return _POCKET / "models" / "pipeline"


def pocket_clip() -> Path:
    """Folder of the CLIP model whose text tower is the pocket backbone's text encoder."""
    return _POCKET / "models" / "clip"


def pocket_art() -> Path:
    """Folder of the drawings that the pocket images are composed of, one subfolder per style."""
    return _POCKET / "art"


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form USER/NAME of a Hugging Face hub id; a local path may have it too."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~"))
