"""A group of jobs that share a backbone: in threads of this process on one device, in a process a device on several."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import DictConfig, OmegaConf

from sdtune import hardware, plan_run, run
from sdtune.checks import plain, trainer_arguments
from sdtune.errors import RunFailed
from sdtune.jobs import Job, as_current, without_hydra
from sdtune.quiet import quiet, quiet_libraries
from sdtune.sharing.pool import Pool
from sdtune.sharing.room import room
from sdtune.sharing.run import Sharing
from sdtune.sharing.turns import Turns
from sdtune.sweep_process import end_with_parent

MaxAdapters = int | Literal["auto"]


class SharingJob(Job):
    """A job whose devices are its group's."""

    @staticmethod
    def apart(config: DictConfig) -> bool:
        return False


def run_group(
    wholes: Sequence[DictConfig], command: str, callbacks: Callbacks, max_adapters: MaxAdapters, called: str
) -> None:
    """Run the jobs of ``wholes``, configs with Hydra's own part; each one's folder says how it ended.

    On several devices the jobs are shared out: each device has the backbone once, and nothing goes between them.
    """
    with as_current(wholes[0]):
        node = plain(wholes[0])["hardware"]
    count = min(hardware.processes(node), len(wholes))
    if count == 1:
        _together(wholes, command, callbacks, max_adapters, called, 1)
        return
    print(f"{called} share one backbone on each of {count} devices")
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(
            target=_on_device,
            args=(index, _visible(node, index), wholes[index::count], command, callbacks, max_adapters, called, count),
        )
        for index in range(count)
    ]
    with _handed_on(children) as asked:
        for child in children:
            child.start()
        for child in children:
            child.join()
    if asked:
        raise SystemExit(128 + asked[0])
    broken = next((i for i, child in enumerate(children) if child.exitcode), None)
    if broken is not None:
        raise RunFailed(f"{called}: the process of device {broken} ended with code {children[broken].exitcode}")


def _visible(node: Mapping[str, Any], index: int) -> str | None:
    """What ``CUDA_VISIBLE_DEVICES`` shall be for the process at ``index``; None where there are no such devices."""
    if hardware.accelerator(str(node.get("accelerator", "auto"))) not in ("gpu", "cuda"):
        return None
    set_before = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = set_before.split(",") if set_before else [str(i) for i in range(torch.cuda.device_count())]
    named = node["devices"] if isinstance(node["devices"], list) else range(len(there))
    return str(there[list(named)[index]])


def _on_device(
    index: int,
    visible: str | None,
    wholes: Sequence[DictConfig],
    command: str,
    callbacks: Callbacks,
    max_adapters: MaxAdapters,
    called: str,
    count: int,
) -> None:
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    # A signal reaches it once, from the sweep's process, however it came.
    os.setsid()
    if sys.platform == "linux":
        end_with_parent()
    setup_globals()
    quiet()
    quiet_libraries()
    _together(wholes, command, callbacks, max_adapters, called, count, index == 0)


@contextlib.contextmanager
def _handed_on(children: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Signals go to ``children``; those that came."""
    asked: list[int] = []

    def heard(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, number)

    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _together(
    wholes: Sequence[DictConfig],
    command: str,
    callbacks: Callbacks,
    max_adapters: MaxAdapters,
    called: str,
    devices: int,
    shown: bool = True,
) -> None:
    """Run the jobs on one device, so many at once as there is room for; ``devices`` groups use this machine."""
    with as_current(wholes[0]):
        arguments = trainer_arguments(plain(wholes[0]))
    most = room([plan_run.job(whole) for whole in wholes], devices) if max_adapters == "auto" else max_adapters
    turns_of = -(-len(wholes) // most)
    seats = -(-len(wholes) // turns_of)
    if devices == 1:
        print(f"{called} share one backbone{'' if turns_of == 1 else f', {seats} at once'}")
    pool = Pool(hardware.device(str(arguments["accelerator"])), str(arguments["precision"]), seats)
    turns = Turns(seats, pool.answer)
    sharing = Sharing(pool, turns, seats)

    def job(whole: DictConfig) -> Callable[[], None]:
        task = SharingJob(command, lambda config, folder: run.prepare(config, folder, sharing))

        def moved() -> None:
            seat = turns.here
            assert seat is not None
            pool.use_threads(False)
            try:
                with _written(whole, shown and seat == 0):
                    # A config is read before a run waits for another one.
                    HydraConfig.instance().set_config(whole)
                    callbacks.on_job_start(config=whole, task_function=task)
                    metric = task.run(without_hydra(whole), whole)
                    done = JobReturn(cfg=without_hydra(whole), hydra_cfg=whole, status=JobStatus.COMPLETED)
                    done.return_value = metric
                    callbacks.on_job_end(config=whole, job_return=done)
            finally:
                sharing.left(seat)

        return moved

    try:
        with _listening(sharing), as_current(wholes[0]):
            turns.run(_until_stopped((job(whole) for whole in wholes), sharing))
    finally:
        pool.use_threads(True)
    if sharing.asked is not None:
        raise SystemExit(128 + sharing.asked)


def _until_stopped(jobs: Iterator[Callable[[], None]], sharing: Sharing) -> Iterator[Callable[[], None]]:
    for job in jobs:
        if sharing.asked is not None:
            return
        yield job


@contextlib.contextmanager
def _written(whole: DictConfig, shown: bool) -> Iterator[None]:
    """What the thread at hand logs goes to its job's file; on the console one job speaks for all, and errors do."""
    settings: Any = OmegaConf.to_container(whole.hydra.job_logging, resolve=True)
    file = settings["handlers"]["file"]
    Path(file["filename"]).parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(file["filename"])]
    handlers += [logging.StreamHandler(sys.stdout)]
    own = threading.get_ident()
    for handler, node in zip(handlers, (file, settings["handlers"]["console"]), strict=True):
        handler.setFormatter(logging.Formatter(settings["formatters"][node["formatter"]]["format"]))
        handler.addFilter(lambda record: record.thread == own)
    if not shown:
        handlers[1].setLevel(logging.WARNING)
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
def _listening(sharing: Sharing) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask every run to save and stop; a second Ctrl-C ends at once."""

    def heard(number: int, frame: FrameType | None) -> None:
        if sharing.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        print("sdtune: stopping; the jobs at hand save first (Ctrl-C again ends them at once)", file=sys.stderr)
        sharing.stop(number)

    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    root = logging.getLogger()
    handlers = list(root.handlers)
    root.handlers = []  # each job has its own
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers = handlers
        for number, handler in before.items():
            signal.signal(number, handler)
