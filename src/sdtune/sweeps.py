"""A sweep: every job is checked before the first starts, each job's end stays on disk, and resumed only the rest runs.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sdtune.errors import Pruned, RunFailed, Stopped
from sdtune.files import write_json
from sdtune.resume import check_unchanged
from sdtune.side_by_side import Relay, reachable, stopping
from sdtune.sweep_process import run_apart

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

    from sdtune.launch import Prepare

STATE = "job.json"
"""Of a job's folder: its overrides, how it ended, and why."""


class Job:
    """What the launcher calls for each job, in this process or in another: it can be pickled."""

    def __init__(self, command: str, prepare: Prepare, beside: bool = False) -> None:
        self.command, self.prepare, self.beside = command, prepare, beside

    def __call__(self, composed: DictConfig) -> float | None:
        """The metric that ``optimized_metric`` names; None where the job failed, which its folder then says."""
        if not self.beside:
            return self._tracked(composed)
        sweep = Path(str(HydraConfig.get().sweep.dir))
        if stopping(sweep) is not None:
            return None
        try:
            with reachable(sweep):
                return self._tracked(composed)
        except (SystemExit, KeyboardInterrupt):
            return None

    def _tracked(self, composed: DictConfig) -> float | None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        overrides = [str(override) for override in HydraConfig.get().overrides.task]
        if finished(folder):
            return _metric(composed, folder)
        state: dict[str, Any] = {"overrides": overrides, "state": "stopped"}
        try:
            with _going_on(composed, folder):
                self._run(composed, overrides, folder)
            state |= {"state": "done", "metric": _metric(composed, folder)}
        except Stopped as stop:
            # Only what is no Exception passes through Hydra and ends the sweep with the job.
            raise SystemExit(stop.code) from stop
        except Pruned as end:
            state |= {"state": "pruned", "step": end.step}
            return None
        except Exception as error:
            # Raised, it would end the sweep; the other jobs run on.
            ours = isinstance(error, ValueError | RunFailed)
            state |= {"state": "failed", "error": f"{'' if ours else f'{type(error).__name__}: '}{error}"}
            print(f"sdtune: job {folder.name} failed: {state['error']}", file=sys.stderr)
            return None
        finally:
            write_json(folder / STATE, state)
            _release()
        return _metric(composed, folder)

    def _run(self, composed: DictConfig, overrides: Sequence[str], folder: Path) -> None:
        run = self.prepare(composed, folder)
        if _several(composed):
            # Lightning would start the other processes with the sweep's own command line, and kill this one with them.
            sources = HydraConfig.get().runtime.config_sources
            own = next((["-cd", str(s.path)] for s in sources if s.provider == "command-line"), [])
            run_apart(self.command, own, overrides, folder, bool(composed.get("resume")))
        else:
            run(composed)


@contextlib.contextmanager
def _going_on(composed: DictConfig, folder: Path) -> Iterator[None]:
    """Have ``composed`` resume what an earlier start of the sweep left in ``folder``, or clear it away."""
    if any((folder / "checkpoints").glob("step*.ckpt")):
        with open_dict(composed):
            composed.resume = str(folder)
    else:
        for left in folder.glob("*"):
            if left.name in ("samples", "checkpoints", "artifact", "evaluation"):
                shutil.rmtree(left)
        (folder / "metrics.csv").unlink(missing_ok=True)
    yield


def _release() -> None:
    """Give back a job's memory, which the next one would find short and count as its own."""
    gc.collect()  # a trainer and its model refer to each other
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)


def finished(folder: Path) -> bool:
    """Whether the run in ``folder`` is complete."""
    return (folder / "metrics.json").is_file()


def _metric(config: DictConfig, folder: Path) -> float | None:
    if not finished(folder) or not config.get("optimized_metric"):
        return None
    value = json.loads((folder / "metrics.json").read_text()).get(config.optimized_metric)
    return float(value) if isinstance(value, int | float) else None


def _several(config: DictConfig) -> bool:
    from sdtune.hardware import processes

    node = OmegaConf.to_container(config.hardware, resolve=True) if "hardware" in config else {}
    assert isinstance(node, dict)
    return processes({str(key): value for key, value in node.items()}) > 1


def multirun(command: str, search: ConfigSearchPath, overrides: list[str], prepare: Prepare) -> int:
    """Run the sweep of a command line; the exit code: 1 where a job failed.

    Raises:
        ValueError: where a job is refused before the first starts, or ``resume=`` names another sweep.
        Stopped: where the user stopped it.
    """
    overrides, before = _taken_up(overrides)
    hydra = Hydra.create_main_hydra2(task_name=command, config_search_path=search)
    try:
        master = hydra.compose_config(
            config_name=command, overrides=overrides, run_mode=RunMode.MULTIRUN, with_log_configuration=False
        )
        folder = before or Path(str(master.hydra.sweep.dir)).expanduser()
        place = str(folder).replace("'", "\\'")
        fixed = [o for o in overrides if not o.startswith("hydra.sweep.dir=")] + [f"hydra.sweep.dir='{place}'"]
        if before is None and (folder / "multirun.yaml").exists():
            raise ValueError(f"hydra.sweep.dir: {folder} already holds a sweep; resume={folder} goes on with it")
        _check(hydra, command, fixed, prepare)
        beside = str(master.hydra.launcher._target_).endswith(".JoblibLauncher")
        job = Job(command, prepare, beside)
        again = f"sdtune {command} -m resume={folder} goes on with it"
        try:
            with Relay(folder) if beside else contextlib.nullcontext() as relay:
                hydra.multirun(config_name=command, task_function=job, overrides=fixed)
        except (SystemExit, KeyboardInterrupt) as stop:
            code = stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
            raise Stopped(f"the sweep is stopped; {again}", code) from stop
        except BrokenExecutor as error:
            raise RunFailed(
                f"a worker was killed, perhaps for memory (hydra.launcher.n_jobs says how many); {again}"
            ) from error
        if relay is not None and relay.code is not None:
            raise Stopped(f"the sweep is stopped; {again}", relay.code)
    finally:
        GlobalHydra.instance().clear()
    return _summary(folder, command)


def _taken_up(overrides: list[str]) -> tuple[list[str], Path | None]:
    """The sweep's own overrides, and the folder that ``resume=`` names."""
    wanted = [o for o in overrides if o.startswith("resume=") and o != "resume=null"]
    if not wanted:
        return overrides, None
    folder = Path(wanted[-1].removeprefix("resume=")).expanduser()
    kept = folder / "multirun.yaml"
    if not kept.is_file():
        raise ValueError(f"resume: {folder} holds no sweep (no multirun.yaml); name the folder of one, or leave out -m")
    loaded = OmegaConf.load(kept)
    own = [str(o) for o in (*loaded.hydra.overrides.task, *loaded.hydra.overrides.hydra)]
    own = [o for o in own if not o.startswith(("hydra.mode=", "hydra.sweep.dir="))]
    given = [o for o in overrides if o not in wanted and not o.startswith("hydra.sweep.dir=")]
    odd = sorted(set(given) ^ set(own)) if given else []
    if odd:
        raise ValueError(
            f"resume: {odd[0]} makes it another sweep than the one in {folder}; repeat its overrides exactly, or give"
            " none"
        )
    return own, folder


def _check(hydra: Hydra, command: str, overrides: list[str], prepare: Prepare) -> None:
    """Compose and check every job of a grid; a sweeper that decides as it goes has its jobs checked as they come."""
    master = hydra.compose_config(
        config_name=command, overrides=overrides, run_mode=RunMode.MULTIRUN, with_log_configuration=False
    )
    sweeper = master.hydra.sweeper
    if not str(sweeper._target_).endswith(".BasicSweeper"):
        return
    texts = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    texts += [str(override) for override in master.hydra.overrides.task]
    parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(texts)
    refused = []
    jobs = [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    for number, job in enumerate(jobs):
        config = hydra.config_loader.load_sweep_config(master, list(job))
        with open_dict(config.hydra):
            config.hydra.job.id = config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        folder = Path(str(master.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
        try:
            _check_job(config, folder, prepare)
        except ValueError as error:
            refused.append(f"job {number} ({_own(job, jobs)}): {error}")
    if refused:
        more = f" (and {len(refused) - 1} more of its jobs)" if len(refused) > 1 else ""
        raise ValueError(f"{refused[0]}{more}; nothing was started")


def _check_job(config: DictConfig, folder: Path, prepare: Prepare) -> None:
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    if (folder / ".hydra" / "config.yaml").is_file():
        container = OmegaConf.to_container(own, resolve=True)
        assert isinstance(container, dict)
        check_unchanged({str(key): value for key, value in container.items()}, folder)
        return
    prepare(own, folder)


def _summary(folder: Path, command: str) -> int:
    """Say how each job ended, and keep it in ``sweep.json``."""
    found = sorted((f.parent for f in folder.glob(f"*/{STATE}")), key=_number)
    jobs = [{"job": place.name, **json.loads((place / STATE).read_text())} for place in found]
    failed = [job for job in jobs if job["state"] == "failed"]
    write_json(folder / "sweep.json", {"jobs": jobs})
    count = {state: sum(job["state"] == state for job in jobs) for state in ("done", "pruned")}
    pruned = f", {count['pruned']} pruned" if count["pruned"] else ""
    print(f"sweep: {count['done']} of {len(jobs)} jobs are done{pruned}: {folder}")
    for job in failed:
        own = _own(job["overrides"], [each["overrides"] for each in jobs])
        print(f"sdtune: job {job['job']} ({own}) failed: {job['error']}", file=sys.stderr)
    if failed:
        print(f"sdtune: sdtune {command} -m resume={folder} runs them again", file=sys.stderr)
    return 1 if failed else 0


def _own(overrides: Sequence[str], of_all: Sequence[Sequence[str]]) -> str:
    """What sets a job apart from the others."""
    return " ".join(o for o in overrides if not all(o in each for each in of_all)) or "the only one"


def names(run: Path) -> dict[str, str | None]:
    """``label``: what sets ``run`` apart from its sweep's other jobs, or its folder's name; ``sweep``: the sweep's."""
    kept, file = run / ".hydra" / "overrides.yaml", run.parent / "multirun.yaml"
    if not file.is_file() or not kept.is_file():
        return {"label": run.name, "sweep": None}
    master = OmegaConf.load(file)
    parsed = OverridesParser.create().parse_overrides([str(o) for o in master.hydra.overrides.task])
    varied = {o.get_key_element() for o in parsed if o.is_sweep_override()} | set(master.hydra.sweeper.params or {})
    own = [str(o) for o in OmegaConf.load(kept) if str(o).split("=", 1)[0] in varied]
    return {"label": " ".join(own) or run.name, "sweep": run.parent.name}


def _number(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdigit() else sys.maxsize, folder.name)
