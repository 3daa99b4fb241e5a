"""One job of a sweep: runs the command and writes its outcome to the job's folder; imports no torch."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from traceback import format_exception
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from sdtune.config.compose import Prepare
from sdtune.errors import Pruned, RunFailed, Stopped, UserError
from sdtune.files import locked, read_json, replacing, write_json, write_text
from sdtune.hardware.allocator import release
from sdtune.output_streams import protect_output
from sdtune.paths import command_line_folder
from sdtune.progress import duration
from sdtune.runs.compare import check_unchanged
from sdtune.runs.hydra_values import unresolved
from sdtune.runs.layout import THREADS, TRAINING_IMAGES
from sdtune.runs.state import ERROR_LOG, STATE, UNFINISHED, finished
from sdtune.sweeps.job_process import run_subprocess
from sdtune.sweeps.joblib_stop import stop_code, stoppable


class Job:
    """Hydra task function for the jobs of a sweep; picklable, so that a launcher can call it in another process.

    Args:
        in_worker: whether the job runs in a joblib worker process.
        labels: the overrides that distinguish each job of a grid from the others; empty if they are not known.
    """

    def __init__(self, command: str, prepare: Prepare, in_worker: bool = False, labels: Sequence[str] = ()) -> None:
        self.command, self.prepare, self.in_worker, self.labels = command, prepare, in_worker, labels
        self._seconds: list[float] = []

    def __call__(self, composed: DictConfig) -> float | None:
        """Run the job; return the value of ``optimized_metric``, or None if the job failed (its folder records why)."""
        full_config = HydraConfig.instance().cfg
        assert full_config is not None
        if not self.in_worker:
            return self.run(composed, full_config)
        protect_output()
        sweep = Path(str(full_config.hydra.sweep.dir))
        try:
            # A stop request after the check of ``stop_code`` reaches this process as a signal.
            with stoppable(sweep):
                return self.run(composed, full_config) if stop_code(sweep) is None else None
        except (SystemExit, KeyboardInterrupt):
            return None

    def run(self, composed: DictConfig, whole: DictConfig) -> float | None:
        """Run the job and write its outcome to its state file; ``whole`` is ``composed`` including Hydra's node."""
        folder = Path(whole.hydra.runtime.output_dir)
        overrides = unresolved(whole.hydra.overrides.task)
        state: dict[str, Any] = {"overrides": overrides, "state": UNFINISHED}
        try:
            if not finished(folder):
                # Written before the run, so that a killed process leaves the state "unfinished".
                write_json(folder / STATE, state)
                (folder / ERROR_LOG).unlink(missing_ok=True)
                self._announce(int(whole.hydra.job.num))
                began = time.monotonic()
                self._run(composed, whole, folder)
                self._seconds.append(time.monotonic() - began)
            state |= {"state": "done", "metric": _metric(composed, folder)}
        except Stopped as stop:
            # Hydra catches every Exception of a job; SystemExit passes through and ends the sweep.
            raise SystemExit(stop.code) from stop
        except Pruned as end:
            state |= {"state": "pruned", "step": end.step}
            return None
        except Exception as error:
            # Not raised again, so that the sweep continues with its other jobs.
            state |= {"state": "failed", **_failure(error, folder)}
            print(f"sdtune: job {folder.name} failed: {state['error']}{_see_traceback(error, folder)}", file=sys.stderr)
            return None
        finally:
            try:
                write_json(folder / STATE, state)
            finally:
                release()
        return _metric(composed, folder)

    def _announce(self, number: int) -> None:
        """Print which job of a grid begins, and an estimate of the time for it and those after it."""
        count = len(self.labels)
        if self.in_worker or number >= count or count < 2:
            return
        left = ""
        if self._seconds:
            left = f", about {duration(sum(self._seconds) / len(self._seconds) * (count - number))} left"
        print(f"job {number + 1} of {count}{left}: {self.labels[number]}")

    def _run(self, composed: DictConfig, full_config: DictConfig, folder: Path) -> None:
        with locked(folder):
            _save_config(composed, full_config, folder)
            _resume_or_clear(composed, folder)
            if not self.needs_subprocess(composed):
                self.prepare(composed, folder)(composed)
                return
        # Lightning would start the other ranks with the sweep's command line and kill the sweep's process with them.
        config_folder = command_line_folder(full_config.hydra.runtime.config_sources)
        overrides = unresolved(full_config.hydra.overrides.task)
        run_subprocess(
            self.command,
            [] if config_folder is None else ["-cd", config_folder],
            overrides,
            folder,
            bool(composed.get("resume")),
        )

    @staticmethod
    def needs_subprocess(config: DictConfig) -> bool:
        """Whether the job runs in a subprocess: with several devices, or with DDP, whose process group remains."""
        from sdtune.config.hardware import process_count

        node = OmegaConf.to_container(config.hardware, resolve=True) if "hardware" in config else {}
        assert isinstance(node, dict)
        settings = {str(key): value for key, value in node.items()}
        return process_count(settings) > 1 or str(settings.get("strategy", "")).startswith("ddp")


def _failure(error: Exception, folder: Path) -> dict[str, str]:
    """Write the traceback of ``error`` to a file; return the error line and the file name for the job's state."""
    details = error.details if isinstance(error, RunFailed) and error.details else "".join(format_exception(error))
    write_text(folder / ERROR_LOG, details)
    name = "" if _is_user_facing(error) else f"{type(error).__name__}: "
    return {"error": f"{name}{error}", "traceback": ERROR_LOG}


def _see_traceback(error: Exception, folder: Path) -> str:
    """Text that names the traceback file of an unexpected error; empty for an error that the user can fix."""
    has_no_traceback = _is_user_facing(error) and not (isinstance(error, RunFailed) and error.details)
    return "" if has_no_traceback else f"; its traceback is in {folder / ERROR_LOG}"


def _is_user_facing(error: Exception) -> bool:
    return isinstance(error, UserError | RunFailed)


def _save_config(composed: DictConfig, full_config: DictConfig, folder: Path) -> None:
    """Save the config as Hydra does, but only once: a resumed job must keep the config that it began with."""
    hydra_folder = folder / ".hydra"
    if (hydra_folder / "config.yaml").is_file():
        container = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(container, dict)
        check_unchanged({str(key): value for key, value in container.items()}, folder)
        return
    write_yaml(hydra_folder / "hydra.yaml", OmegaConf.masked_copy(full_config, ["hydra"]))
    write_yaml(hydra_folder / "overrides.yaml", full_config.hydra.overrides.task)
    write_yaml(hydra_folder / "config.yaml", composed)  # last, so that its presence means that the other files exist


def write_yaml(path: Path, config: Any) -> None:
    """Save ``config`` atomically, with its interpolations unresolved."""
    with replacing(path) as partial:
        OmegaConf.save(config, partial)


def _resume_or_clear(composed: DictConfig, folder: Path) -> None:
    """Set ``resume`` in ``composed`` if ``folder`` has a checkpoint of an earlier start; otherwise delete its files."""
    if any((folder / "checkpoints").glob("step*.ckpt")):
        with open_dict(composed):
            composed.resume = str(folder)
        return
    for name in ("samples", "checkpoints", "artifact", "evaluation", TRAINING_IMAGES):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.csv", THREADS):
        (folder / name).unlink(missing_ok=True)


def _metric(config: DictConfig, folder: Path) -> float | None:
    if not finished(folder) or not config.get("optimized_metric"):
        return None
    value = read_json(folder / "metrics.json").get(config.optimized_metric)
    return float(value) if isinstance(value, int | float) else None
