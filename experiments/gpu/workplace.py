"""The folders of a check, and how its measurements run ``sdtune`` in them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.gpu.configurations import Plan
from experiments.gpu.processes import COMMAND, Measuring, start
from experiments.gpu.report import Budget

_PATIENCE = 6.0
"""A process is stopped when it takes this many times the seconds that it should take."""


@dataclass
class Workplace:
    """Folders, budget and options of a check.

    Args:
        out: folder of the results and of the logs of the processes.
        work: folder of weights, images, caches and runs.
        gpu_gib: memory of the GPU in GiB.
        cpu_reference: file with the losses of a CPU; None: they are computed.
        diffusers: checkout of diffusers; None: it is not measured.
        plans: by name of the configuration or card; empty until they are computed.
        measured: results of the clock by name of the configuration, which two checks use.
    """

    out: Path
    work: Path
    budget: Budget
    gpu_gib: float
    cpu_reference: Path | None = None
    diffusers: Path | None = None
    plans: dict[str, Plan] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    def start(
        self,
        name: str,
        seconds: float,
        target: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ) -> Measuring:
        """Call the function ``target`` (``MODULE:FUNCTION``) in a new process, whose log is ``out/logs/NAME.log``.

        Args:
            seconds: what it should take; it may take longer while the budget lasts.
        """
        limit = max(seconds, min(_PATIENCE * seconds, self.budget.left))
        caches = {"SDTUNE_CACHE": str(self.work / "cache")}
        log = self.out / "logs" / f"{_file_name(name)}.log"
        log.unlink(missing_ok=True)
        return start(target, *arguments, log=log, limit=limit, environment={**caches, **(environment or {})})

    def sdtune(self, name: str, seconds: float, *words: str, environment: Mapping[str, str] | None = None) -> None:
        """Run ``sdtune WORDS`` in a new process and wait for it.

        Raises:
            MeasurementFailed: it ended with an error, or took too long.
        """
        self.start(name, seconds, COMMAND, *words, environment=environment).wait()

    def new_run_folder(self, name: str) -> Path:
        """Folder for the run ``name``; an earlier run in it is removed."""
        folder = self._runs / _file_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def new_cache(self, name: str) -> dict[str, str]:
        """Environment of a process with an empty cache, except for the hashes of the weights; removed with the runs."""
        folder = self._runs / f"cache-{_file_name(name)}"
        if (hashes := self.work / "cache" / "hashes").is_dir():
            shutil.copytree(hashes, folder / "hashes", dirs_exist_ok=True)
        return {"SDTUNE_CACHE": str(folder)}

    def remove_runs(self) -> None:
        """Remove the folders of all runs."""
        shutil.rmtree(self._runs, ignore_errors=True)

    @property
    def _runs(self) -> Path:
        return self.work / "runs"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)
