"""Run a group of jobs on one backbone: one process per device, one thread per job."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import DictConfig, OmegaConf

from sdtune.commands import train
from sdtune.commands.plan import checked_plan, plan_request
from sdtune.commands.threads import save_threads
from sdtune.config import hardware
from sdtune.config.compose import without_hydra
from sdtune.config.hydra_compat import Callbacks
from sdtune.config.settings import plain
from sdtune.config.trainer import trainer_arguments
from sdtune.errors import RunFailed
from sdtune.hardware.devices import device as device_of
from sdtune.hardware.sessions import lead_session
from sdtune.hardware.signals import STOP_SIGNALS, handled
from sdtune.hardware.threads import configured_threads, free_cores, torch_threads
from sdtune.log_filters import quiet, quiet_libraries
from sdtune.output_streams import protect_output
from sdtune.planning.request import PlanRequest
from sdtune.runs.hydra_values import as_current
from sdtune.runs.state import saved_threads
from sdtune.shared_backbone.capacity import processes_that_fit, runs_that_fit
from sdtune.shared_backbone.compatibility import largest_config, largest_rank
from sdtune.shared_backbone.pool import Pool
from sdtune.shared_backbone.session import SharedBackbone
from sdtune.shared_backbone.step_coordinator import StepCoordinator
from sdtune.sweeps.job import Job
from sdtune.sweeps.job_process import terminate_with_parent
from sdtune.sweeps.joblib_stop import STOPPING

Auto = int | Literal["auto"]


class SharingJob(Job):
    """A job on the device of its group; it never starts a subprocess."""

    @staticmethod
    def needs_subprocess(config: DictConfig) -> bool:
        return False


@dataclass(frozen=True)
class JobGroup:
    """Jobs that share a backbone.

    Args:
        wholes: configs of the jobs, including Hydra's node.
        command: name of the top-level config.
        callbacks: Hydra callbacks.
        max_concurrent_runs: maximum number of concurrent runs per device, or ``auto``.
        called: name of the jobs in messages.
        shown: whether the first run logs to the console.
    """

    full_configs: Sequence[DictConfig]
    command: str
    callbacks: Callbacks
    max_concurrent_runs: Auto
    called: str
    shown: bool = True


def run_group(group: JobGroup, processes: Auto) -> None:
    """Run the jobs of ``group``; each job's folder records its outcome.

    The jobs are divided among processes: one per GPU, or ``processes`` on a CPU. Each process has its own copy of the
    backbone. The processes do not communicate.

    Raises:
        RunFailed: a process or a joint step failed, or the folder of a job is not writable.
        SystemExit: a signal stopped the group.
    """
    with as_current(group.full_configs[0]):
        node = plain(group.full_configs[0])["hardware"]
    devices, unit = devices_of(node), "devices"
    fixed_threads = configured_threads(node, _previous_threads(group))
    free = free_cores()
    if len(devices) == 1 and devices[0].type == "cpu":
        devices, unit = devices * _cpu_processes(group, processes, max(1, free // (fixed_threads or 1))), "processes"
    devices = devices[: len(group.full_configs)]
    threads = fixed_threads or max(1, free // len(devices))
    if len(devices) == 1:
        with torch_threads(threads):
            _run_jobs(group, devices[0], 1)
        return
    print(f"{group.called} share one backbone {'on' if unit == 'devices' else 'in'} each of {len(devices)} {unit}")
    _run_processes(group, devices, threads)


def devices_of(node: Mapping[str, Any]) -> list[torch.device]:
    """Devices of a ``hardware`` node; GPUs have an index, because ``torch.cuda.set_device`` needs one."""
    kind = device_of(str(node.get("accelerator", "auto")))
    if kind.type == "cuda":
        return [torch.device("cuda", index) for index in hardware.indices(node)]
    return [kind] * hardware.process_count(node)


def _cpu_processes(group: JobGroup, processes: Auto, limit: int) -> int:
    """Number of processes for jobs on a CPU; ``limit`` is the number that the free cores allow."""
    if processes != "auto":
        return processes
    count = min(limit, len(group.full_configs))
    return processes_that_fit(plan_requests(group.full_configs), count, torch.device("cpu")) if count > 1 else 1


def _previous_threads(group: JobGroup) -> int | None:
    """Number of threads that the jobs used before the sweep was resumed; None if no job has started."""
    counts = (saved_threads(Path(config.hydra.runtime.output_dir)) for config in group.full_configs)
    return next((count for count in counts if count is not None), None)


def _run_processes(group: JobGroup, devices: Sequence[torch.device], threads: int) -> None:
    count = len(devices)
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(
            target=_run_on_device,
            args=(
                replace(group, full_configs=group.full_configs[index::count], shown=index == 0),
                device,
                count,
                threads,
            ),
        )
        for index, device in enumerate(devices)
    ]
    with _signals_forwarded(children) as received:
        for child in children:
            child.start()
            if received and child.pid is not None:
                os.kill(child.pid, received[-1])  # the signal arrived before this child was started
        for child in children:
            child.join()
    if received:
        raise SystemExit(128 + received[0])
    failed = next((i for i, child in enumerate(children) if child.exitcode), None)
    if failed is not None:
        location = f"on {devices[failed]} " if devices[failed].type != "cpu" else ""
        raise RunFailed(f"{group.called}: process {failed} {location}exited with code {children[failed].exitcode}")


def _run_on_device(group: JobGroup, device: torch.device, devices: int, threads: int) -> None:
    # In a new session, signals arrive only from the sweep's process and only once.
    lead_session()
    protect_output()
    if sys.platform == "linux":
        terminate_with_parent()
    setup_globals()
    quiet()
    quiet_libraries()
    try:
        with torch_threads(threads):
            _run_jobs(group, device, devices)
    except RunFailed as error:
        print(f"sdtune: {error}", file=sys.stderr)
        raise SystemExit(1) from None


@contextlib.contextmanager
def _signals_forwarded(children: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Context manager that forwards stop signals to ``children``; yields the list of received signals."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, number)

    with handled(STOP_SIGNALS, forward):
        yield received


def _run_jobs(group: JobGroup, device: torch.device, devices: int) -> None:
    """Run the jobs on ``device``, as many concurrently as fit; ``devices`` is the number of devices in use."""
    shared = _shared_backbone(group, device, devices)
    failures: list[RunFailed] = []
    jobs = (_JobThread(config, group, shared, failures) for config in group.full_configs)
    try:
        with _stop_on_signals(shared), as_current(group.full_configs[0]):
            shared.coordinator.run(_until_stopped(jobs, shared))
    finally:
        shared.pool.use_threads(True)
    if shared.stop_signal is not None:
        raise SystemExit(128 + shared.stop_signal)
    if shared.coordinator.error is not None:
        raise shared.coordinator.error
    if failures:
        raise failures[0]


def _shared_backbone(group: JobGroup, device: torch.device, devices: int) -> SharedBackbone:
    with as_current(group.full_configs[0]):
        precision = str(trainer_arguments(plain(group.full_configs[0]))["precision"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    count, limit = len(group.full_configs), group.max_concurrent_runs
    if limit == "auto":
        limit = runs_that_fit(plan_requests(group.full_configs), count, device, devices)
    rounds = -(-count // limit)
    size = -(-count // rounds)
    if devices == 1 and count > 1:
        print(f"{group.called} share one backbone{'' if rounds == 1 else f', {size} at a time'}")
    methods: list[Any] = [OmegaConf.to_container(config.method, resolve=True) for config in group.full_configs]
    has_dropout = any(method.get("dropout") for method in methods)
    pool = Pool(device, precision, size, max(map(largest_rank, methods)), has_dropout)
    return SharedBackbone(pool, StepCoordinator(size, pool.answer), size)


class _JobThread:
    """One job of the group; it runs in a thread of the step coordinator."""

    def __init__(self, config: DictConfig, group: JobGroup, shared: SharedBackbone, failures: list[RunFailed]) -> None:
        self.config, self.group, self.shared, self.failures = config, group, shared, failures

    def __call__(self) -> None:
        number = self.shared.coordinator.current_number
        assert number is not None
        self.shared.pool.use_threads(False)
        try:
            with _job_logging(self.config, self.group.shown and number == 0):
                self._run()
        except SystemExit:
            if self.shared.stop_signal is None:
                raise
            # The run has saved. The other runs received the stop too and end when they have saved.
        except OSError as error:
            # Only this job's folder is not writable; the other jobs continue.
            self.failures.append(RunFailed(f"job {Path(self.config.hydra.runtime.output_dir).name}: {error}"))
            print(f"sdtune: {self.failures[-1]}", file=sys.stderr)
        finally:
            self.shared.remove(number)

    def _run(self) -> None:
        # HydraConfig is global to all threads; a run reads it before it first waits for the other runs.
        HydraConfig.instance().set_config(self.config)
        task = SharingJob(self.group.command, self._prepare)
        self.group.callbacks.on_job_start(config=self.config, task_function=task)
        metric = task.run(without_hydra(self.config), self.config)
        done = JobReturn(cfg=without_hydra(self.config), hydra_cfg=self.config, status=JobStatus.COMPLETED)
        done.return_value = metric
        self.group.callbacks.on_job_end(config=self.config, job_return=done)

    def _prepare(self, config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
        run = train.build_run(config, folder, shared=True)
        save_threads(folder, self.shared.pool.threads)
        return lambda composed: run.start(self.shared)


def plan_requests(full_configs: Sequence[DictConfig]) -> list[PlanRequest]:
    """Plan requests with the largest costs that any of the jobs can have, one request per optimizer."""
    jobs = [checked_plan(full_config, shared=True) for full_config in full_configs]
    configs = [job.config for job in jobs]
    optimizers = {str(config["optimizer"]["_target_"]): config["optimizer"] for config in configs}
    caches = {key: all(job.data[key] for job in jobs) for key in ("cache_latents", "cache_text")}
    family = jobs[0].source.facts.family
    largest = [largest_config(configs, optimizer, family) for optimizer in optimizers.values()]
    return [plan_request(replace(jobs[0], config=config, data={**jobs[0].data, **caches})) for config in largest]


def _until_stopped(jobs: Iterator[Callable[[], None]], shared: SharedBackbone) -> Iterator[Callable[[], None]]:
    for job in jobs:
        if shared.stop_signal is not None:
            return
        yield job


@contextlib.contextmanager
def _job_logging(config: DictConfig, shown: bool) -> Iterator[None]:
    """Context manager that logs the current thread to its job's file; to the console only warnings unless ``shown``."""
    settings: Any = OmegaConf.to_container(config.hydra.job_logging, resolve=True)
    root_settings = settings.get("root") or {}
    handlers: list[logging.Handler] = []
    thread_id = threading.get_ident()
    for name in root_settings.get("handlers") or ():
        node = settings["handlers"][name]
        if "filename" in node:
            Path(node["filename"]).parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(node["filename"], encoding="utf-8"))
        else:
            handlers.append(logging.StreamHandler(sys.stdout))
        if "formatter" in node:
            handlers[-1].setFormatter(logging.Formatter(settings["formatters"][node["formatter"]]["format"]))
        handlers[-1].addFilter(lambda record: record.thread == thread_id)
        only_warnings = "filename" not in node and not shown
        handlers[-1].setLevel(logging.WARNING if only_warnings else root_settings.get("level", "INFO"))
    root = logging.getLogger()
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


@contextlib.contextmanager
def _stop_on_signals(shared: SharedBackbone) -> Iterator[None]:
    """Context manager in which Ctrl-C and SIGTERM make every run save and stop; a second Ctrl-C ends immediately."""

    def stop(number: int, frame: FrameType | None) -> None:
        if shared.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        print(STOPPING, file=sys.stderr)
        shared.stop(number)

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    main_thread = threading.get_ident()
    console = logging.StreamHandler(sys.stdout)
    console.addFilter(lambda record: record.thread == main_thread)
    root.handlers = [console]  # each job adds its own handlers
    root.setLevel(logging.INFO)
    try:
        with handled(STOP_SIGNALS, stop):
            yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
