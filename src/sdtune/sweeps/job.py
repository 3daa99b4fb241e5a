"""A sweep's job: runs once, and writes to its folder how it ended; imports no torch."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from traceback import format_exception
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from sdtune.config.compose import Prepare
from sdtune.errors import Pruned, RunFailed, Stopped, UserError
from sdtune.files import locked, replacing, write_json, write_text
from sdtune.hardware.allocator import release
from sdtune.paths import command_line_folder
from sdtune.runs.compare import check_unchanged
from sdtune.runs.layout import THREADS
from sdtune.runs.state import ERROR_LOG, STATE, UNFINISHED, finished
from sdtune.sweeps.job_process import run_apart
from sdtune.sweeps.joblib_stop import reachable, stopping


class Job:
    """What the launcher calls for each job, in this process or in another: it can be pickled.

    Args:
        in_worker: it runs in one of joblib's workers.
    """

    def __init__(self, command: str, prepare: Prepare, in_worker: bool = False) -> None:
        self.command, self.prepare, self.in_worker = command, prepare, in_worker

    def __call__(self, composed: DictConfig) -> float | None:
        """The metric that ``optimized_metric`` names; None where the job failed, which its folder then says."""
        whole = HydraConfig.instance().cfg
        assert whole is not None
        if not self.in_worker:
            return self.run(composed, whole)
        sweep = Path(str(whole.hydra.sweep.dir))
        try:
            # A stop that comes between the two reaches this process by a signal.
            with reachable(sweep):
                return self.run(composed, whole) if stopping(sweep) is None else None
        except (SystemExit, KeyboardInterrupt):
            return None

    def run(self, composed: DictConfig, whole: DictConfig) -> float | None:
        """Run the job of ``composed``, and keep how it ended; ``whole`` is its config with Hydra's own part."""
        folder = Path(whole.hydra.runtime.output_dir)
        overrides = [str(override) for override in whole.hydra.overrides.task]
        state: dict[str, Any] = {"overrides": overrides, "state": UNFINISHED}
        try:
            if not finished(folder):
                # What a killed process leaves behind says that it was not at an end.
                write_json(folder / STATE, state)
                (folder / ERROR_LOG).unlink(missing_ok=True)
                self._run(composed, whole, folder)
            state |= {"state": "done", "metric": _metric(composed, folder)}
        except Stopped as stop:
            # Only what is no Exception passes through Hydra and ends the sweep with the job.
            raise SystemExit(stop.code) from stop
        except Pruned as end:
            state |= {"state": "pruned", "step": end.step}
            return None
        except Exception as error:
            # Raised, it would end the sweep; the other jobs run on.
            state |= {"state": "failed", **_failure(error, folder)}
            print(f"sdtune: job {folder.name} failed: {state['error']}{_where(error, folder)}", file=sys.stderr)
            return None
        finally:
            try:
                write_json(folder / STATE, state)
            finally:
                release()
        return _metric(composed, folder)

    def _run(self, composed: DictConfig, whole: DictConfig, folder: Path) -> None:
        with locked(folder):
            _keep_config(composed, whole, folder)
            _go_on(composed, folder)
            if not self.apart(composed):
                self.prepare(composed, folder)(composed)
                return
        # Lightning would start the other processes with the sweep's own command line, and kill this one with them.
        own = command_line_folder(whole.hydra.runtime.config_sources)
        overrides = [str(override) for override in whole.hydra.overrides.task]
        run_apart(self.command, [] if own is None else ["-cd", own], overrides, folder, bool(composed.get("resume")))

    @staticmethod
    def apart(config: DictConfig) -> bool:
        """Whether the job is a process of its own: where it has several devices, or a process group to leave behind."""
        from sdtune.config.hardware import process_count

        node = OmegaConf.to_container(config.hardware, resolve=True) if "hardware" in config else {}
        assert isinstance(node, dict)
        settings = {str(key): value for key, value in node.items()}
        return process_count(settings) > 1 or str(settings.get("strategy", "")).startswith("ddp")


def _failure(error: Exception, folder: Path) -> dict[str, str]:
    """The line of ``error`` for the job's state; its traceback goes to a file of its own."""
    details = error.details if isinstance(error, RunFailed) and error.details else "".join(format_exception(error))
    write_text(folder / ERROR_LOG, details)
    name = "" if _is_users(error) else f"{type(error).__name__}: "
    return {"error": f"{name}{error}", "traceback": ERROR_LOG}


def _where(error: Exception, folder: Path) -> str:
    """Where the traceback of a bug lies; nothing for what the user can mend."""
    known = _is_users(error) and not (isinstance(error, RunFailed) and error.details)
    return "" if known else f"; its traceback is in {folder / ERROR_LOG}"


def _is_users(error: Exception) -> bool:
    return isinstance(error, UserError | RunFailed)


@contextlib.contextmanager
def as_current(whole: DictConfig) -> Iterator[None]:
    """Within it, interpolations of Hydra's are those of ``whole``."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(whole)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def _keep_config(composed: DictConfig, whole: DictConfig, folder: Path) -> None:
    """Write what Hydra writes of a job, once: resumed, it would be overwritten by what is composed today."""
    place = folder / ".hydra"
    if (place / "config.yaml").is_file():
        container = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(container, dict)
        check_unchanged({str(key): value for key, value in container.items()}, folder)
        return
    write_yaml(place / "hydra.yaml", OmegaConf.masked_copy(whole, ["hydra"]))
    write_yaml(place / "overrides.yaml", whole.hydra.overrides.task)
    write_yaml(place / "config.yaml", composed)  # last: that it is there says that the others are


def write_yaml(path: Path, config: Any) -> None:
    """``config`` with its interpolations as they stand, whole or not at all."""
    with replacing(path) as partial:
        OmegaConf.save(config, partial)


def _go_on(composed: DictConfig, folder: Path) -> None:
    """Have ``composed`` resume what an earlier start of the sweep left in ``folder``, or clear it away."""
    if any((folder / "checkpoints").glob("step*.ckpt")):
        with open_dict(composed):
            composed.resume = str(folder)
        return
    for name in ("samples", "checkpoints", "artifact", "evaluation"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.csv", THREADS):
        (folder / name).unlink(missing_ok=True)


def _metric(config: DictConfig, folder: Path) -> float | None:
    if not finished(folder) or not config.get("optimized_metric"):
        return None
    value = json.loads((folder / "metrics.json").read_text()).get(config.optimized_metric)
    return float(value) if isinstance(value, int | float) else None
