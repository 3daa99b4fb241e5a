"""Run a sweep: check every job before the first starts; when resumed, run only the jobs that are not finished.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sdtune.config.compose import Prepare, check_folder_name, without_hydra
from sdtune.config.hydra_compat import Hydra, grid_of_jobs, initialized
from sdtune.config.overrides import resumed_folder
from sdtune.errors import RunFailed, Stopped, UserError
from sdtune.files import locked, read_yaml, write_json
from sdtune.hardware.signals import STOP_SIGNALS, handled, stop_before_start
from sdtune.paths import command_line_folder
from sdtune.quoting import override, shell_override, shell_word
from sdtune.runs.compare import check_same, check_unchanged, flat
from sdtune.runs.hydra_values import as_current, unresolved
from sdtune.runs.state import STATE, ended, finished, saved_threads
from sdtune.runs.trials import JOURNAL
from sdtune.sweeps.job import Job
from sdtune.sweeps.joblib_stop import StopRelay
from sdtune.sweeps.launchers import divided_cores, is_joblib, is_slurm, plugin
from sdtune.sweeps.optuna_sweeper import OptunaSweeper, check_search, example
from sdtune.sweeps.shared_launcher import SharedBackboneLauncher

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

_SUBDIR = "${hydra.job.num}"
_CHANGEABLE = (
    "hydra.sweeper.n_trials=",
    "hydra.launcher.max_concurrent_runs=",
    "hydra.launcher.processes=",
    "hydra.launcher.n_jobs=",
    "hardware.threads=",
)
"""Overrides that may change when a sweep is resumed: the length of a search, and the use of the machine's resources."""


def multirun(command: str, search: ConfigSearchPath, overrides: list[str], prepare: Prepare) -> int:
    """Run the sweep of a command line; return the exit code, which is 1 if a job failed.

    Raises:
        UserError: a job is invalid (no job has started then), or ``resume=`` names another sweep.
        Stopped: a stop signal ended the sweep.
        RunFailed: the launcher failed.
    """
    overrides, previous_folder = _resumed(overrides, search)
    with initialized(command, search) as hydra:
        master = _compose(hydra, command, overrides)
        with as_current(master):
            folder = previous_folder or Path(str(master.hydra.sweep.dir)).expanduser()
        updated = [o for o in overrides if not o.startswith("hydra.sweep.dir=")]
        # Without the mode, which Hydra's own command line also sets, a job does not know that it belongs to a sweep.
        updated += [override("hydra.sweep.dir", folder), "hydra.mode=MULTIRUN"]
        _check_master(master, folder, previous_folder is not None)
        with handled(STOP_SIGNALS, stop_before_start):
            max_concurrent, labels = _check(hydra, command, updated, prepare)
        if previous_folder is not None:
            saved_config = read_yaml(folder / "multirun.yaml", "resume")
            assert isinstance(saved_config, DictConfig)
            saved, current = (flat(OmegaConf.to_container(without_hydra(config))) for config in (saved_config, master))
            saved = {key: value for key, value in saved.items() if f"{key}=" not in _CHANGEABLE}
            check_same(saved, current, folder, "sweep")
        with _worker_cores(master, folder, max_concurrent) as in_worker:
            _launch(hydra, Job(command, prepare, in_worker, labels), updated, folder)
    return _summary(folder, command)


def _worker_cores(master: DictConfig, folder: Path, max_concurrent: int) -> contextlib.AbstractContextManager[bool]:
    """Context manager that gives joblib workers their share of the cores; yields whether the jobs run in workers."""
    launcher = master.hydra.launcher
    if not is_joblib(plugin(launcher)):
        return contextlib.nullcontext(False)
    hardware = OmegaConf.to_container(master.hardware, resolve=True) if "hardware" in master else {}
    assert isinstance(hardware, dict)
    thread_counts = (saved_threads(job_folder) for job_folder in folder.glob("*") if not finished(job_folder))
    previous_threads = max((count for count in thread_counts if count is not None), default=None)
    settings = {str(key): value for key, value in hardware.items()}
    return divided_cores(int(launcher.n_jobs), settings, max_concurrent, previous_threads)


def _launch(hydra: Hydra, job: Job, overrides: list[str], folder: Path) -> None:
    """Run the jobs in ``folder`` with Hydra's sweeper and launcher.

    Raises:
        Stopped, RunFailed: the sweep did not finish; the command that continues it is printed or in the message.
    """
    # It would repeat the common overrides for each job.
    logging.getLogger("hydra._internal.core_plugins.basic_launcher").setLevel(logging.WARNING)
    hint = f"continue it with: sdtune {job.command} -m {shell_override('resume', folder)}"
    try:
        with locked(folder), StopRelay(folder) if job.in_worker else contextlib.nullcontext() as relay:
            # No output subfolder of Hydra: the job saves its config itself, see sdtune.sweeps.job.
            hydra.multirun(job.command, task_function=job, overrides=[*overrides, "hydra.output_subdir=null"])
    except (SystemExit, KeyboardInterrupt) as stop:
        code = stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
        raise Stopped(f"the sweep is stopped; {hint}", code) from stop
    except RunFailed:
        _summary(folder, job.command)
        print(f"sdtune: the sweep is unfinished; {hint}", file=sys.stderr)
        raise
    except BrokenExecutor as error:
        raise RunFailed(
            "the sweep ended because a worker was killed, perhaps for lack of memory; lower hydra.launcher.n_jobs;"
            f" {hint}"
        ) from error
    if relay is not None and relay.code is not None:
        raise Stopped(f"the sweep is stopped; {hint}", relay.code)


def _compose(hydra: Hydra, command: str, overrides: list[str]) -> DictConfig:
    """Compose the config that all jobs have in common."""
    master: DictConfig = hydra.compose_config(
        config_name=command, overrides=overrides, run_mode=RunMode.MULTIRUN, with_log_configuration=False
    )
    return master


def _check_master(master: DictConfig, folder: Path, resumed: bool) -> None:
    """Raise UserError for settings of the sweep with which its jobs could not run."""
    if OmegaConf.to_container(master.hydra.sweep, resolve=False)["subdir"] != _SUBDIR:  # type: ignore[index, call-overload]
        raise UserError("job folders are named by job number", key="hydra.sweep.subdir", remedy="remove this override")
    if not resumed and (folder / "multirun.yaml").exists():
        resume = shell_override("resume", folder)
        raise UserError(
            f"{folder} already contains a sweep", key="hydra.sweep.dir", remedy=f"add {resume} to continue it"
        )
    check_folder_name(folder, "hydra.sweep.dir")
    launcher = master.hydra.launcher
    kind = plugin(launcher)
    for key in ("env_set", "chdir"):
        if issubclass(kind, SharedBackboneLauncher) and master.hydra.job.get(key):
            raise UserError(
                "jobs that share a backbone run in one process",
                key=f"hydra.job.{key}",
                remedy="remove this setting",
            )
    for key in ("max_concurrent_runs", "processes"):
        count = launcher.get(key, "auto")
        if count != "auto" and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise UserError(
                f"got {count!r}", key=f"hydra.launcher.{key}", remedy="set auto or an integer of at least 1"
            )
    if launcher.get("n_jobs", 1) == 0:
        raise UserError(
            "got 0", key="hydra.launcher.n_jobs", remedy="set the number of processes, or -1 to use all free cores"
        )
    if is_slurm(kind) and shutil.which("srun") is None:
        raise UserError(
            "submitit_slurm needs SLURM, but srun is not found",
            key="hydra/launcher",
            remedy="set hydra/launcher=submitit_local to run without SLURM",
        )


def _resumed(overrides: list[str], search: ConfigSearchPath) -> tuple[list[str], Path | None]:
    """Overrides of the sweep to resume and its folder, from ``resume=``; without it, ``overrides`` and None.

    Adds the ``--config-dir`` of the resumed sweep to ``search``.
    """
    folder = resumed_folder(overrides)
    if folder is None:
        return overrides, None
    saved_file = folder / "multirun.yaml"
    if not saved_file.is_file():
        raise UserError(
            f"{folder} is not a sweep folder (multirun.yaml is missing)",
            key="resume",
            remedy="name the folder of a sweep, or remove -m",
        )
    saved_config = read_yaml(saved_file, "resume")
    saved = [*unresolved(saved_config.hydra.overrides.task), *unresolved(saved_config.hydra.overrides.hydra)]
    saved = [item for item in saved if not item.startswith(("hydra.mode=", "hydra.sweep.dir=", "hydra.output_subdir="))]
    changed = [item for item in overrides if item.startswith(_CHANGEABLE)]
    saved = [item for item in saved if not item.startswith(tuple(f"{new.split('=', 1)[0]}=" for new in changed))]
    given = [item for item in overrides if item not in changed and not item.startswith(("resume=", "hydra.sweep.dir="))]
    required = [item for item in saved if given and not item.startswith(_CHANGEABLE)]
    conflicts = [item for item in given if item not in saved] or [item for item in required if item not in given]
    if conflicts:
        problem = "is not an override of" if conflicts[0] in given else "is missing, but is an override of"
        raise UserError(
            f"{conflicts[0]} {problem} the sweep in {folder}",
            key="resume",
            remedy="repeat its overrides exactly, or omit all of them",
        )
    config_folder = command_line_folder(saved_config.hydra.runtime.config_sources)
    if config_folder is not None and not any(path.provider == "command-line" for path in search.get_path()):
        search.prepend(
            provider="command-line", path=f"file://{config_folder}", anchor=SearchPathQuery(provider="schema")
        )
    return [*saved, *changed], folder


def _check(hydra: Hydra, command: str, overrides: list[str], prepare: Prepare) -> tuple[int, list[str]]:
    """Compose and check every job of a grid, or one example job of a search, before the sweep starts.

    Returns:
        The maximum number of concurrent jobs, and the overrides that distinguish each job of a grid.
    """
    master = _compose(hydra, command, overrides)
    jobs, names = _known_jobs(hydra, master)
    if len(jobs) > 1:
        common = " ".join(shell_word(text) for text in jobs[0] if all(text in job for job in jobs))
        print(f"checking {len(jobs)} jobs before the first starts{f'; all with: {common}' if common else ''}")
    errors: dict[str, list[str]] = {}
    is_measured = not jobs
    for number, job in enumerate(jobs):
        config = hydra.config_loader.load_sweep_config(master, list(job))
        with open_dict(config.hydra):
            config.hydra.job.id = config.hydra.job.num = number
        job_folder = Path(str(master.hydra.sweep.dir)) / names[number]
        try:
            with as_current(config, job_folder):
                _check_job(config, job_folder, prepare)
                is_measured = is_measured or _is_measured(config)
        except UserError as error:
            distinct = f" ({_distinct_overrides(job, jobs)})" if len(jobs) > 1 else ""
            name = f"job {names[number]}{distinct}" if names[0] == "0" else "the search's jobs"
            errors.setdefault(str(error), []).append(name)
    if errors:
        reasons = [
            f"{failed[0]}{f' and {len(failed) - 1} more' if len(failed) > 1 else ''}: {error}"
            for error, failed in errors.items()
        ]
        more = f"; and {len(reasons) - 2} more errors" if len(reasons) > 2 else ""
        raise UserError(f"{'; '.join(reasons[:2])}{more}; no job was started")
    if not is_measured:
        print(
            "WARNING: the jobs record no metric that ranks them; remove evaluation=none if it is set, or set"
            " data.hold_out=5 or data.validation_path=DIR (validation loss), or evaluation=clip evaluation.clip=DIR"
        )
    labels = [_distinct_overrides(job, jobs) for job in jobs] if names[:1] == ["0"] else []
    return int(master.hydra.sweeper.get("n_jobs", 0)) or len(jobs) or sys.maxsize, labels


def _is_measured(config: DictConfig) -> bool:
    """Whether the job of ``config`` records a metric that ``sdtune report`` can rank it by, or is no training."""
    if "optimizer" not in config:
        return True
    select = partial(OmegaConf.select, config)
    sources = [f"data.sources.{name}" for name in select("data.sources", default=None) or {}]
    keys = [f"{data}.{name}" for data in ("data", *sources) for name in ("hold_out", "validation_path")]
    if any(select(key) for key in ("optimized_metric", *keys)):
        return True
    return bool(config.get("evaluation")) and any(select(f"evaluation.{key}", default=True) for key in ("clip", "dino"))


def _known_jobs(hydra: Hydra, master: DictConfig) -> tuple[Sequence[Sequence[str]], list[str]]:
    """Overrides of the jobs that are known before the start, and the names of their folders."""
    sweeper = master.hydra.sweeper
    texts = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    texts += unresolved(master.hydra.overrides.task)
    parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(texts)
    kind = plugin(sweeper)
    jobs = grid_of_jobs(kind, parsed)
    if jobs is not None:
        return jobs, [str(number) for number in range(len(jobs))]
    if issubclass(kind, OptunaSweeper):
        check_search(master, parsed)
        return [example(parsed)], ["example"]
    return [], []  # the jobs of a third-party sweeper are unknown before it runs


def _check_job(config: DictConfig, folder: Path, prepare: Prepare) -> None:
    job_config = without_hydra(config)
    if (folder / ".hydra" / "config.yaml").is_file():
        container = OmegaConf.to_container(job_config, resolve=True)
        assert isinstance(container, dict)
        check_unchanged({str(key): value for key, value in container.items()}, folder)
        return
    prepare(job_config, folder)


def _summary(folder: Path, command: str) -> int:
    """Print how each job ended, write it to ``sweep.json`` and return the exit code."""
    job_folders = sorted((f.parent for f in folder.glob(f"*/{STATE}")), key=_sort_key)
    jobs = [{"job": job_folder.name, **ended(job_folder)} for job_folder in job_folders]
    failed = [job for job in jobs if job["state"] not in ("done", "pruned")]
    write_json(folder / "sweep.json", {"jobs": jobs})
    count = {state: sum(job["state"] == state for job in jobs) for state in ("done", "pruned")}
    pruned = f", {count['pruned']} pruned" if count["pruned"] else ""
    print(f"sweep: {count['done']} of {len(jobs)} jobs are done{pruned}: {folder}")
    if command == "train" and count["done"] > 1:
        _print_ranking(folder)
    print(f"artifacts: {folder}/*/artifact; compare the jobs with: sdtune report {shell_word(str(folder))}")
    for job in failed:
        distinct = _distinct_overrides(job["overrides"], [other["overrides"] for other in jobs])
        outcome = f"failed: {job['error']}" if job["state"] == "failed" else f"is {job['state']}"
        print(f"sdtune: job {job['job']} ({distinct}) {outcome}", file=sys.stderr)
    if failed and not (folder / JOURNAL).exists():  # a search does not run ended trials again
        resume = f"sdtune {command} -m {shell_override('resume', folder)}"
        print(f"sdtune: run the failed jobs again with: {resume}", file=sys.stderr)
    return 1 if failed else 0


def _print_ranking(folder: Path) -> None:
    from sdtune.reporting import collect, ranking_lines  # not for the answers that need no training

    for line in ranking_lines(collect(folder)):
        print(line)


def _distinct_overrides(overrides: Sequence[str], jobs: Sequence[Sequence[str]]) -> str:
    """Overrides that distinguish a job from the other ``jobs``."""
    return " ".join(o for o in overrides if not all(o in job for job in jobs)) or "the only job"


def _sort_key(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdigit() else sys.maxsize, folder.name)
