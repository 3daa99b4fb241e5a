"""``sdtune evaluate run=RUN``: the figures of a finished run again, from its artifact, before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtune.launch import main
from sdtune.quiet import quiet, quiet_libraries

if TYPE_CHECKING:
    from omegaconf import DictConfig


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check the config, and give the function that measures."""
    quiet()
    from sdtune.evaluate_run import prepare as prepare_run

    quiet_libraries()
    return prepare_run(config, folder)


if __name__ == "__main__":
    main("evaluate", prepare)
