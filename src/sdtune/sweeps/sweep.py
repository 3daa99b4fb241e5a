"""Run a sweep: check every job before the first starts; when resumed, run only the jobs that are not finished.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sdtune.config.compose import Prepare, without_hydra
from sdtune.config.hydra_compat import Hydra, grid_of_jobs, initialized
from sdtune.config.overrides import resumed_folder
from sdtune.errors import RunFailed, Stopped, UserError
from sdtune.files import locked, write_json
from sdtune.paths import command_line_folder
from sdtune.quoting import override, shell_override, shell_word
from sdtune.runs.compare import check_same, check_unchanged, flat
from sdtune.runs.state import STATE, ended, finished, kept_threads
from sdtune.runs.trials import JOURNAL
from sdtune.sweeps.job import Job
from sdtune.sweeps.joblib_stop import Relay
from sdtune.sweeps.launchers import is_joblib, is_slurm, plugin, shared_out_cores
from sdtune.sweeps.optuna_sweeper import OptunaSweeper, check_search, example
from sdtune.sweeps.shared_launcher import SharedBackboneLauncher

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

_SUBDIR = "${hydra.job.num}"
_ANEW = (
    "hydra.sweeper.n_trials=",
    "hydra.launcher.max_concurrent_runs=",
    "hydra.launcher.processes=",
    "hydra.launcher.n_jobs=",
    "hardware.threads=",
)
"""A search may be extended, and a machine have less room than was thought."""


def multirun(command: str, search: ConfigSearchPath, overrides: list[str], prepare: Prepare) -> int:
    """Run the sweep of a command line; the exit code: 1 where a job failed.

    Raises:
        UserError: where a job is refused before the first starts, or ``resume=`` names another sweep.
        Stopped: where the user stopped it.
    """
    overrides, before = _taken_up(overrides, search)
    with initialized(command, search) as hydra:
        master = _compose(hydra, command, overrides)
        folder = before or Path(str(master.hydra.sweep.dir)).expanduser()
        fixed = [o for o in overrides if not o.startswith("hydra.sweep.dir=")] + [override("hydra.sweep.dir", folder)]
        _check_master(master, folder, before is not None)
        at_once = _check(hydra, command, fixed, prepare)
        if before is not None:
            kept = OmegaConf.load(folder / "multirun.yaml")
            assert isinstance(kept, DictConfig)
            began, now = (flat(OmegaConf.to_container(without_hydra(each))) for each in (kept, master))
            began = {key: value for key, value in began.items() if f"{key}=" not in _ANEW}
            check_same(began, now, folder, "sweep")
        with _workers(master, folder, at_once) as in_worker:
            _launch(hydra, Job(command, prepare, in_worker), fixed, folder)
    return _summary(folder, command)


def _workers(master: DictConfig, folder: Path, at_once: int) -> contextlib.AbstractContextManager[bool]:
    """Within it, joblib's workers have their shares of the cores; yields whether the jobs run in workers."""
    launcher = master.hydra.launcher
    if not is_joblib(plugin(launcher)):
        return contextlib.nullcontext(False)
    hardware = OmegaConf.to_container(master.hardware, resolve=True) if "hardware" in master else {}
    assert isinstance(hardware, dict)
    begun = (kept_threads(each) for each in folder.glob("*") if not finished(each))
    kept = max((count for count in begun if count is not None), default=None)
    own = {str(key): value for key, value in hardware.items()}
    return shared_out_cores(int(launcher.n_jobs), own, at_once, kept)


def _launch(hydra: Hydra, job: Job, overrides: list[str], folder: Path) -> None:
    """Have Hydra's sweeper and launcher run the jobs in ``folder``; Stopped or RunFailed where they do not end."""
    again = f"sdtune {job.command} -m {shell_override('resume', folder)} goes on with it"
    try:
        with locked(folder), Relay(folder) if job.in_worker else contextlib.nullcontext() as relay:
            # The job keeps its config itself: see sdtune.sweeps.job.
            hydra.multirun(job.command, task_function=job, overrides=[*overrides, "hydra.output_subdir=null"])
    except (SystemExit, KeyboardInterrupt) as stop:
        code = stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
        raise Stopped(f"the sweep is stopped; {again}", code) from stop
    except RunFailed:
        _summary(folder, job.command)
        print(f"sdtune: {again}", file=sys.stderr)
        raise
    except BrokenExecutor as error:
        raise RunFailed(
            f"a worker was killed, perhaps for memory (hydra.launcher.n_jobs says how many); {again}"
        ) from error
    if relay is not None and relay.code is not None:
        raise Stopped(f"the sweep is stopped; {again}", relay.code)


def _compose(hydra: Hydra, command: str, overrides: list[str]) -> DictConfig:
    """What all jobs have in common."""
    master: DictConfig = hydra.compose_config(
        config_name=command, overrides=overrides, run_mode=RunMode.MULTIRUN, with_log_configuration=False
    )
    return master


def _check_master(master: DictConfig, folder: Path, resumed: bool) -> None:
    """Refuse settings of the whole sweep with which its jobs could not run."""
    if OmegaConf.to_container(master.hydra.sweep, resolve=False)["subdir"] != _SUBDIR:  # type: ignore[index, call-overload]
        raise UserError(
            "the jobs' folders are called by their numbers", key="hydra.sweep.subdir", remedy="leave it out"
        )
    if not resumed and (folder / "multirun.yaml").exists():
        again = shell_override("resume", folder)
        raise UserError(f"{folder} already holds a sweep; {again} goes on with it", key="hydra.sweep.dir")
    launcher = master.hydra.launcher
    kind = plugin(launcher)
    for key in ("env_set", "chdir"):
        if issubclass(kind, SharedBackboneLauncher) and master.hydra.job.get(key):
            raise UserError(
                "jobs on one backbone are one process", key=f"hydra.job.{key}", remedy="give hydra/launcher=basic"
            )
    for key in ("max_concurrent_runs", "processes"):
        most = launcher.get(key, "auto")
        if most != "auto" and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise UserError(f"{most!r}", key=f"hydra.launcher.{key}", remedy="give auto, or a number of at least 1")
    if launcher.get("n_jobs", 1) == 0:
        raise UserError("0", key="hydra.launcher.n_jobs", remedy="give a number of processes, or -1 to fill the cores")
    if is_slurm(kind) and shutil.which("srun") is None:
        raise UserError(
            "submitit_slurm needs SLURM, and there is no srun here; submitit_local tries it without",
            key="hydra/launcher",
        )


def _taken_up(overrides: list[str], search: ConfigSearchPath) -> tuple[list[str], Path | None]:
    """The sweep's own overrides, and the folder that ``resume=`` names; its ``--config-dir`` goes to ``search``."""
    folder = resumed_folder(overrides)
    if folder is None:
        return overrides, None
    kept = folder / "multirun.yaml"
    if not kept.is_file():
        raise UserError(
            f"{folder} holds no sweep (no multirun.yaml)",
            key="resume",
            remedy="name the folder of one, or leave out -m",
        )
    loaded = OmegaConf.load(kept)
    own = [str(o) for o in (*loaded.hydra.overrides.task, *loaded.hydra.overrides.hydra)]
    own = [o for o in own if not o.startswith(("hydra.mode=", "hydra.sweep.dir=", "hydra.output_subdir="))]
    anew = [o for o in overrides if o.startswith(_ANEW)]
    own = [o for o in own if not o.startswith(tuple(f"{given.split('=', 1)[0]}=" for given in anew))]
    given = [o for o in overrides if o not in anew and not o.startswith(("resume=", "hydra.sweep.dir="))]
    odd = [o for o in given if o not in own] or [o for o in own if given and o not in given]
    if odd:
        how = "makes it another sweep than" if odd[0] in given else "is left out, which makes it another sweep than"
        raise UserError(
            f"{odd[0]} {how} the one in {folder}", key="resume", remedy="repeat its overrides exactly, or give none"
        )
    kept_folder = command_line_folder(loaded.hydra.runtime.config_sources)
    if kept_folder is not None and not any(one.provider == "command-line" for one in search.get_path()):
        search.prepend(provider="command-line", path=f"file://{kept_folder}", anchor=SearchPathQuery(provider="schema"))
    return [*own, *anew], folder


def _check(hydra: Hydra, command: str, overrides: list[str], prepare: Prepare) -> int:
    """Compose and check every job of a grid; of a search one example, the others as they come.

    Gives how many jobs may run at once.
    """
    master = _compose(hydra, command, overrides)
    jobs, names = _jobs(hydra, master)
    if len(jobs) > 1:
        print(f"checking {len(jobs)} jobs before the first starts")
    refused: dict[str, list[str]] = {}
    for number, job in enumerate(jobs):
        config = hydra.config_loader.load_sweep_config(master, list(job))
        with open_dict(config.hydra):
            config.hydra.job.id = config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        try:
            _check_job(config, Path(str(master.hydra.sweep.dir)) / names[number], prepare)
        except UserError as error:
            own = f" ({_own(job, jobs)})" if len(jobs) > 1 else ""
            who = f"job {names[number]}{own}" if names[0] == "0" else "the search's jobs"
            refused.setdefault(str(error), []).append(who)
    if refused:
        each = [f"{who[0]}{f' and {len(who) - 1} more' if len(who) > 1 else ''}: {why}" for why, who in refused.items()]
        more = f"; and {len(each) - 2} other reasons" if len(each) > 2 else ""
        raise UserError(f"{'; '.join(each[:2])}{more}; nothing was started")
    return int(master.hydra.sweeper.get("at_once", 0)) or len(jobs) or sys.maxsize


def _jobs(hydra: Hydra, master: DictConfig) -> tuple[Sequence[Sequence[str]], list[str]]:
    """The overrides of each job that can be known before the start, and the names of their folders."""
    sweeper = master.hydra.sweeper
    texts = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    texts += [str(text) for text in master.hydra.overrides.task]
    parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(texts)
    kind = plugin(sweeper)
    jobs = grid_of_jobs(kind, parsed)
    if jobs is not None:
        return jobs, [str(number) for number in range(len(jobs))]
    if issubclass(kind, OptunaSweeper):
        check_search(master, parsed)
        return [example(parsed)], ["example"]
    return [], []  # a sweeper of another package: what it will ask for is not known


def _check_job(config: DictConfig, folder: Path, prepare: Prepare) -> None:
    own = without_hydra(config)
    if (folder / ".hydra" / "config.yaml").is_file():
        container = OmegaConf.to_container(own, resolve=True)
        assert isinstance(container, dict)
        check_unchanged({str(key): value for key, value in container.items()}, folder)
        return
    prepare(own, folder)


def _summary(folder: Path, command: str) -> int:
    """Say how each job ended, and keep it in ``sweep.json``."""
    found = sorted((f.parent for f in folder.glob(f"*/{STATE}")), key=_number)
    jobs = [{"job": place.name, **ended(place)} for place in found]
    failed = [job for job in jobs if job["state"] not in ("done", "pruned")]
    write_json(folder / "sweep.json", {"jobs": jobs})
    count = {state: sum(job["state"] == state for job in jobs) for state in ("done", "pruned")}
    pruned = f", {count['pruned']} pruned" if count["pruned"] else ""
    print(f"sweep: {count['done']} of {len(jobs)} jobs are done{pruned}: {folder}")
    print(f"what each left is in its folder's artifact; to compare them: sdtune report {shell_word(str(folder))}")
    for job in failed:
        own = _own(job["overrides"], [each["overrides"] for each in jobs])
        how = f"failed: {job['error']}" if job["state"] == "failed" else f"is {job['state']}"
        print(f"sdtune: job {job['job']} ({own}) {how}", file=sys.stderr)
    if failed and not (folder / JOURNAL).exists():  # to a search they are trials that have ended
        print(f"sdtune: sdtune {command} -m {shell_override('resume', folder)} runs them again", file=sys.stderr)
    return 1 if failed else 0


def _own(overrides: Sequence[str], of_all: Sequence[Sequence[str]]) -> str:
    """What sets a job apart from the others."""
    return " ".join(o for o in overrides if not all(o in each for each in of_all)) or "the only one"


def _number(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdigit() else sys.maxsize, folder.name)
