"""A group of jobs on one backbone: threads of one process per device."""

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
from sdtune.commands.threads import keep_threads
from sdtune.config import hardware
from sdtune.config.compose import without_hydra
from sdtune.config.hydra_compat import Callbacks
from sdtune.config.settings import plain
from sdtune.config.trainer import trainer_arguments
from sdtune.errors import RunFailed
from sdtune.hardware.devices import device as device_of
from sdtune.hardware.signals import STOP_SIGNALS, handled
from sdtune.hardware.threads import free_cores, given_threads, torch_threads
from sdtune.log_filters import quiet, quiet_libraries
from sdtune.planning.request import PlanRequest
from sdtune.runs.state import kept_threads
from sdtune.shared_backbone.capacity import processes_that_fit, room
from sdtune.shared_backbone.compatibility import largest, widest
from sdtune.shared_backbone.pool import Pool
from sdtune.shared_backbone.session import SharedBackbone
from sdtune.shared_backbone.step_coordinator import StepCoordinator
from sdtune.sweeps.job import Job, as_current
from sdtune.sweeps.job_process import end_with_parent
from sdtune.sweeps.joblib_stop import STOPPING

Auto = int | Literal["auto"]


class SharingJob(Job):
    """A job whose devices are its group's."""

    @staticmethod
    def apart(config: DictConfig) -> bool:
        return False


@dataclass(frozen=True)
class JobGroup:
    """Jobs that share a backbone.

    Args:
        wholes: their configs with Hydra's own part.
        command: the name of the top config.
        callbacks: Hydra's.
        max_concurrent_runs: how many at once, on each device.
        called: how messages name them.
        shown: whether its first run logs to the console.
    """

    wholes: Sequence[DictConfig]
    command: str
    callbacks: Callbacks
    max_concurrent_runs: Auto
    called: str
    shown: bool = True


def run_group(group: JobGroup, processes: Auto) -> None:
    """Run the jobs of ``group``; each one's folder says how it ended.

    The jobs are shared out over several processes, one for each GPU or, on a CPU, as many as ``processes`` says: each
    has the backbone once, and nothing goes between them.
    """
    with as_current(group.wholes[0]):
        node = plain(group.wholes[0])["hardware"]
    devices, each = devices_of(node), "devices"
    given = given_threads(node, _kept_threads(group))
    free = free_cores()
    if len(devices) == 1 and devices[0].type == "cpu":
        devices, each = devices * _cpu_processes(group, processes, max(1, free // (given or 1))), "processes"
    devices = devices[: len(group.wholes)]
    threads = given or max(1, free // len(devices))
    if len(devices) == 1:
        with torch_threads(threads):
            _together(group, devices[0], 1)
        return
    print(f"{group.called} share one backbone {'on' if each == 'devices' else 'in'} each of {len(devices)} {each}")
    _run_processes(group, devices, threads)


def devices_of(node: Mapping[str, Any]) -> list[torch.device]:
    """Those that a ``hardware`` node asks for; GPUs by index, without which CUDA makes none the current one."""
    kind = device_of(str(node.get("accelerator", "auto")))
    if kind.type == "cuda":
        return [torch.device("cuda", index) for index in hardware.indices(node)]
    return [kind] * hardware.process_count(node)


def _cpu_processes(group: JobGroup, asked: Auto, most: int) -> int:
    """The number of processes for the jobs on a CPU; ``most`` is the number that the free cores allow."""
    if asked != "auto":
        return asked
    count = min(most, len(group.wholes))
    return processes_that_fit(plan_requests(group.wholes), count, torch.device("cpu")) if count > 1 else 1


def _kept_threads(group: JobGroup) -> int | None:
    """The number of threads from before the sweep was resumed; None if no job has started yet."""
    kept = (kept_threads(Path(whole.hydra.runtime.output_dir)) for whole in group.wholes)
    return next((count for count in kept if count is not None), None)


def _run_processes(group: JobGroup, devices: Sequence[torch.device], threads: int) -> None:
    count = len(devices)
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(
            target=_on_device,
            args=(replace(group, wholes=group.wholes[index::count], shown=index == 0), device, count, threads),
        )
        for index, device in enumerate(devices)
    ]
    with _handed_on(children) as asked:
        for child in children:
            child.start()
            if asked and child.pid is not None:
                os.kill(child.pid, asked[-1])  # it came between two starts
        for child in children:
            child.join()
    if asked:
        raise SystemExit(128 + asked[0])
    broken = next((i for i, child in enumerate(children) if child.exitcode), None)
    if broken is not None:
        where = f"on {devices[broken]} " if devices[broken].type != "cpu" else ""
        raise RunFailed(f"{group.called}: process {broken} {where}ended with code {children[broken].exitcode}")


def _on_device(group: JobGroup, device: torch.device, devices: int, threads: int) -> None:
    # A signal reaches it once, from the sweep's process, however it came.
    os.setsid()
    if sys.platform == "linux":
        end_with_parent()
    setup_globals()
    quiet()
    quiet_libraries()
    try:
        with torch_threads(threads):
            _together(group, device, devices)
    except RunFailed as error:
        print(f"sdtune: {error}", file=sys.stderr)
        raise SystemExit(1) from None


@contextlib.contextmanager
def _handed_on(children: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Signals go to ``children``; those that came."""
    asked: list[int] = []

    def heard(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, number)

    with handled(STOP_SIGNALS, heard):
        yield asked


def _together(group: JobGroup, device: torch.device, devices: int) -> None:
    """Run the jobs on ``device``, so many at once as there is room for; ``devices`` groups use this machine."""
    shared = _shared_backbone(group, device, devices)
    lost: list[RunFailed] = []
    jobs = (_SharingJob(whole, group, shared, lost) for whole in group.wholes)
    try:
        with _listening(shared), as_current(group.wholes[0]):
            shared.coordinator.run(_until_stopped(jobs, shared))
    finally:
        shared.pool.use_threads(True)
    if shared.asked is not None:
        raise SystemExit(128 + shared.asked)
    if shared.coordinator.broken is not None:
        raise shared.coordinator.broken
    if lost:
        raise lost[0]


def _shared_backbone(group: JobGroup, device: torch.device, devices: int) -> SharedBackbone:
    with as_current(group.wholes[0]):
        precision = str(trainer_arguments(plain(group.wholes[0]))["precision"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    count, most = len(group.wholes), group.max_concurrent_runs
    if most == "auto":
        most = room(plan_requests(group.wholes), count, device, devices)
    rounds = -(-count // most)
    size = -(-count // rounds)
    if devices == 1 and count > 1:
        print(f"{group.called} share one backbone{'' if rounds == 1 else f', {size} at once'}")
    methods: list[Any] = [OmegaConf.to_container(whole.method, resolve=True) for whole in group.wholes]
    drops = any(method.get("dropout") for method in methods)
    pool = Pool(device, precision, size, max(map(widest, methods)), drops)
    return SharedBackbone(pool, StepCoordinator(size, pool.answer), size)


class _SharingJob:
    """One job in a thread of the step coordinator."""

    def __init__(self, whole: DictConfig, group: JobGroup, shared: SharedBackbone, lost: list[RunFailed]) -> None:
        self.whole, self.group, self.shared, self.lost = whole, group, shared, lost

    def __call__(self) -> None:
        number = self.shared.coordinator.here
        assert number is not None
        self.shared.pool.use_threads(False)
        try:
            with _written(self.whole, self.group.shown and number == 0):
                self._run()
        except SystemExit:
            if self.shared.asked is None:
                raise
            # It has saved; the others have been asked as well, and end when they have.
        except OSError as error:
            # Its folder cannot be written; the others' can.
            self.lost.append(RunFailed(f"job {Path(self.whole.hydra.runtime.output_dir).name}: {error}"))
            print(f"sdtune: {self.lost[-1]}", file=sys.stderr)
        finally:
            self.shared.left(number)

    def _run(self) -> None:
        # A config is read before a run waits for another one.
        HydraConfig.instance().set_config(self.whole)
        task = SharingJob(self.group.command, self._prepare)
        self.group.callbacks.on_job_start(config=self.whole, task_function=task)
        metric = task.run(without_hydra(self.whole), self.whole)
        done = JobReturn(cfg=without_hydra(self.whole), hydra_cfg=self.whole, status=JobStatus.COMPLETED)
        done.return_value = metric
        self.group.callbacks.on_job_end(config=self.whole, job_return=done)

    def _prepare(self, config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
        run = train.checked_run(config, folder, shared=True)
        keep_threads(folder, self.shared.pool.threads)
        return lambda composed: run.start(self.shared)


def plan_requests(wholes: Sequence[DictConfig]) -> list[PlanRequest]:
    """What any of the jobs may cost, for each optimizer that one of them has."""
    jobs = [checked_plan(whole, shared=True) for whole in wholes]
    configs = [job.config for job in jobs]
    optimizers = {str(config["optimizer"]["_target_"]): config["optimizer"] for config in configs}
    caches = {key: all(job.data[key] for job in jobs) for key in ("cache_latents", "cache_text")}
    return [
        plan_request(replace(jobs[0], config=largest(configs, optimizer), data={**jobs[0].data, **caches}))
        for optimizer in optimizers.values()
    ]


def _until_stopped(jobs: Iterator[Callable[[], None]], shared: SharedBackbone) -> Iterator[Callable[[], None]]:
    for job in jobs:
        if shared.asked is not None:
            return
        yield job


@contextlib.contextmanager
def _written(whole: DictConfig, shown: bool) -> Iterator[None]:
    """What the thread at hand logs goes to its job's file; on the console one job speaks for all, and errors do."""
    settings: Any = OmegaConf.to_container(whole.hydra.job_logging, resolve=True)
    top = settings.get("root") or {}
    handlers: list[logging.Handler] = []
    own = threading.get_ident()
    for name in top.get("handlers") or ():
        node = settings["handlers"][name]
        if "filename" in node:
            Path(node["filename"]).parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(node["filename"]))
        else:
            handlers.append(logging.StreamHandler(sys.stdout))
        if "formatter" in node:
            handlers[-1].setFormatter(logging.Formatter(settings["formatters"][node["formatter"]]["format"]))
        handlers[-1].addFilter(lambda record: record.thread == own)
        hushed = "filename" not in node and not shown
        handlers[-1].setLevel(logging.WARNING if hushed else top.get("level", "INFO"))
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
def _listening(shared: SharedBackbone) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask every run to save and stop; a second Ctrl-C ends at once."""

    def heard(number: int, frame: FrameType | None) -> None:
        if shared.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        print(STOPPING, file=sys.stderr)
        shared.stop(number)

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    main = threading.get_ident()
    console = logging.StreamHandler(sys.stdout)
    console.addFilter(lambda record: record.thread == main)
    root.handlers = [console]  # each job has its own
    root.setLevel(logging.INFO)
    try:
        with handled(STOP_SIGNALS, heard):
            yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
