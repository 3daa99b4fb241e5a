"""``sdtune train``: one training run, from a composed config to a folder with its artifact and figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtune.launch import main
from sdtune.quiet import quiet, quiet_libraries
from sdtune.resume import rewrite

if TYPE_CHECKING:
    from omegaconf import DictConfig


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check everything that can be checked without weights, and give the run."""
    quiet()
    from sdtune.run import prepare as prepare_run

    quiet_libraries()
    return prepare_run(config, folder)


if __name__ == "__main__":
    main("train", prepare, rewrite=rewrite)
