"""``sdtune mask``: write masks of what words describe next to images, with CLIPSeg."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Interval, MinLen
from omegaconf import DictConfig

from sdtune.captioning.masker import Masker
from sdtune.captioning.models import check_model_name, locate_model
from sdtune.captioning.outputs import Outputs, interruptible, mask_outputs, print_summary, write_outputs
from sdtune.commands.threads import choose_threads
from sdtune.config import hardware
from sdtune.config.schema import check_value
from sdtune.config.settings import plain
from sdtune.data.listing import count_and_names
from sdtune.images.grids import save_png

_TYPES: dict[str, Any] = {
    "model": str,
    "words": Annotated[list[Annotated[str, MinLen(1)]], MinLen(1)],
    "threshold": Annotated[float, Interval(gt=0, le=1)] | None,
    "overwrite": bool,
    "batch_size": Annotated[int, Ge(1)],
}


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check ``config`` without loading weights, and return the function that writes the masks."""
    options = plain(config, ("data", "hardware"))
    hardware.check_hardware(options["hardware"])
    check_value(options["data"]["path"], str, "data.path")
    if not isinstance(options["words"], list):
        options["words"] = [options["words"]]
    for key, hint in _TYPES.items():
        check_value(options[key], hint, key)
    outputs = mask_outputs(options["data"]["path"], options["overwrite"])
    check_model_name(options["model"], "mask")

    def start(composed: DictConfig) -> None:
        with interruptible(outputs.kind), choose_threads(options["hardware"]):
            _write(options, outputs)

    return start


def _write(options: Mapping[str, Any], outputs: Outputs) -> None:
    black: list[Path] = []

    def write(target: Path, mask: npt.NDArray[np.uint8]) -> None:
        save_png(mask, target)
        if not mask.any():
            black.append(target)

    unreadable = []
    if outputs.missing:
        masker = Masker(
            locate_model(options["model"], "mask"),
            options["words"],
            options["threshold"],
            hardware.first_device(options["hardware"]),
            str(options["hardware"]["precision"]),
        )
        unreadable = write_outputs(outputs, options["batch_size"], masker, write)
    if black:
        print(f"black everywhere: {count_and_names(black, outputs.folder)}; try other words or a lower threshold")
    print_summary(outputs, unreadable)
