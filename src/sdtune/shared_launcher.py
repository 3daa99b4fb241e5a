"""A Hydra launcher that runs a sweep's jobs together, on one backbone, wherever they differ in settings alone.

torch is imported when jobs are launched, so that Hydra's search for plugins costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from sdtune.jobs import Job, finished
from sdtune.quiet import quiet, quiet_libraries
from sdtune.sharing.turns import Turns

if TYPE_CHECKING:
    from sdtune.sharing.run import Sharing

log = logging.getLogger("sdtune")


class SharedBackboneLauncher(Launcher):  # type: ignore[misc]
    """Runs jobs that may share a backbone at once, in one process, and the others one after another.

    Args:
        max_adapters: how many at once; ``auto``: as many as the device's memory holds by ``sdtune plan``'s count.
    """

    def __init__(self, max_adapters: int | Literal["auto"] = "auto") -> None:
        self.max_adapters = max_adapters
        self.config: DictConfig
        self.context: HydraContext
        self.task: Job

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        assert isinstance(task_function, Job), "sdtune's sweeps run sdtune's jobs"
        self.config, self.context, self.task = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run them all; each job's folder says how it ended."""
        setup_globals()
        quiet()
        from sdtune.checks import plain
        from sdtune.sharing.groups import Group, difference, groups

        quiet_libraries()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        wholes = [self._whole(list(each), initial_job_idx + i) for i, each in enumerate(job_overrides)]
        returns = [JobReturn(overrides=list(each), status=JobStatus.COMPLETED) for each in job_overrides]
        left = [i for i, whole in enumerate(wholes) if not finished(Path(whole.hydra.runtime.output_dir))]
        configs = []
        for number in left:
            with _as_current(wholes[number]):
                configs.append(plain(_own(wholes[number])))
        found = groups(configs)
        largest = max(found, key=lambda group: len(group.jobs), default=Group())
        for group in found:
            numbers = [left[place] for place in group.jobs]
            called = _called([initial_job_idx + number for number in numbers])
            if len(numbers) > 1:
                self._together([wholes[number] for number in numbers], called)
                continue
            if len(left) > 1:
                other = configs[largest.jobs[0]] if largest.jobs else configs[0]
                why = group.alone or f"{difference(configs[group.jobs[0]], other)} is another than the others'"
                print(f"{called} by itself: {why}")
            returns[numbers[0]] = self._by_itself(list(job_overrides[numbers[0]]), initial_job_idx + numbers[0])
        for number in set(range(len(wholes))) - set(left):
            # Its state file may be another's: the run was completed by itself.
            returns[number] = self._by_itself(list(job_overrides[number]), initial_job_idx + number)
        return returns

    def _sweep_config(self, overrides: list[str], number: int) -> DictConfig:
        config: DictConfig = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _whole(self, overrides: list[str], number: int) -> DictConfig:
        """The job's config with Hydra's own part, its folder settled, as Hydra's ``run_job`` has it."""
        config = self._sweep_config(overrides, number)
        with _as_current(config):
            folder = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(folder.absolute())
        return config

    def _by_itself(self, overrides: list[str], number: int) -> JobReturn:
        done = run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=self._sweep_config(overrides, number),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return done

    def _together(self, wholes: Sequence[DictConfig], called: str) -> None:
        """Run jobs that share a backbone, so many at once as there is room for."""
        from sdtune import hardware, plan_run, run
        from sdtune.checks import plain, trainer_arguments
        from sdtune.sharing.pool import Pool
        from sdtune.sharing.room import room
        from sdtune.sharing.run import Sharing

        with _as_current(wholes[0]):
            arguments = trainer_arguments(plain(_own(wholes[0])))
        most = room([plan_run.job(whole) for whole in wholes]) if self.max_adapters == "auto" else self.max_adapters
        turns_of = -(-len(wholes) // most)
        seats = -(-len(wholes) // turns_of)
        several = "" if turns_of == 1 else f", {seats} at once"
        print(f"{called} share one backbone{several}")
        pool = Pool(hardware.device(str(arguments["accelerator"])), str(arguments["precision"]))
        turns = Turns(seats, pool.answer)
        sharing = Sharing(pool, turns, seats)

        def job(whole: DictConfig) -> Callable[[], None]:
            task = Job(self.task.command, lambda config, folder: run.prepare(config, folder, sharing))

            def moved() -> None:
                seat = turns.here
                assert seat is not None
                try:
                    with _written(whole, seat == 0):
                        # A config is read before a run waits for another one.
                        HydraConfig.instance().set_config(whole)
                        self.context.callbacks.on_job_start(config=whole, task_function=task)
                        metric = task.run(_own(whole), whole)
                        done = JobReturn(cfg=_own(whole), hydra_cfg=whole, status=JobStatus.COMPLETED)
                        done.return_value = metric
                        self.context.callbacks.on_job_end(config=whole, job_return=done)
                finally:
                    sharing.left(seat)

            return moved

        with _listening(sharing), _as_current(wholes[0]):
            turns.run(_until_stopped((job(whole) for whole in wholes), sharing))
        if sharing.asked is not None:
            raise SystemExit(128 + sharing.asked)


def _until_stopped(jobs: Iterator[Callable[[], None]], sharing: Sharing) -> Iterator[Callable[[], None]]:
    for job in jobs:
        if sharing.asked is not None:
            return
        yield job


def _own(whole: DictConfig) -> DictConfig:
    """A job's config without Hydra's part."""
    return OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])


@contextlib.contextmanager
def _as_current(config: DictConfig) -> Iterator[None]:
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def _called(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"job {numbers[0]}"
    run = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"jobs {numbers[0]}-{numbers[-1]}" if run else f"jobs {', '.join(map(str, numbers))}"


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
