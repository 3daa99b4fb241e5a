"""Lines that wait for the GPU, found by torch's debug mode."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import sdtune

_SDTUNE = Path(sdtune.__file__).parent


class WaitingLines:
    """Counts the lines that wait for the GPU.

    Attributes:
        lines: the line that waits and the last two lines of sdtune that led to it, ``FILE:LINE <- FILE:LINE`` -> number
            of waits.
    """

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()

    def start(self) -> None:
        """Count the waits from now on; other warnings are not shown any more."""
        torch.cuda.set_sync_debug_mode("warn")
        warnings.simplefilter("always")
        warnings.showwarning = self._count

    def stop(self) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def _count(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith("warnings.py")]
        of_sdtune = [frame for frame in frames if Path(frame.filename).is_relative_to(_SDTUNE)][-2:]
        lines = [f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno}" for f in (frames[-1], *reversed(of_sdtune))]
        self.lines[" <- ".join(dict.fromkeys(lines))] += 1
