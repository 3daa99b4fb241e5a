"""Hydra launcher that runs jobs of a sweep together on one backbone.

torch is imported when jobs are launched, so that Hydra's search for plugins costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from sdtune.errors import RunFailed
from sdtune.log_filters import quiet, quiet_libraries
from sdtune.runs.state import finished
from sdtune.sweeps.job import Job, as_current


class SharedBackboneLauncher(Launcher):  # type: ignore[misc]
    """Runs jobs that may share a backbone at once, in one process, and the others one after another.

    Args:
        max_concurrent_runs: how many at once; ``auto``: as many as the device's memory holds by the count of
            ``sdtune plan``.
    """

    def __init__(self, max_concurrent_runs: int | Literal["auto"] = "auto") -> None:
        self.max_concurrent_runs = max_concurrent_runs
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
        from sdtune.config.hardware import process_count
        from sdtune.config.settings import plain
        from sdtune.hardware.allocator import release
        from sdtune.shared_backbone.compatibility import Group, difference, groups
        from sdtune.sweeps.shared_group import run_group

        quiet_libraries()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        wholes = [self._whole(list(each), initial_job_idx + i) for i, each in enumerate(job_overrides)]
        returns = [JobReturn(overrides=list(each), status=JobStatus.COMPLETED) for each in job_overrides]
        left = [i for i, whole in enumerate(wholes) if not finished(Path(whole.hydra.runtime.output_dir))]
        configs = []
        for number in left:
            with as_current(wholes[number]):
                configs.append(plain(wholes[number]))
        found = groups(configs)
        failed: list[str] = []
        largest = max(found, key=lambda group: len(group.jobs), default=Group())
        for group in found:
            numbers = [left[place] for place in group.jobs]
            called = _called([initial_job_idx + number for number in numbers])
            if len(numbers) == 1 and len(left) > 1:
                other = configs[next(g for g in (largest, *found) if g is not group).jobs[0]]
                why = group.alone or f"{difference(configs[group.jobs[0]], other)} is another than the others'"
                print(f"{called} by itself: {why}")
            # One that is left over has the device that it would have had among others, and not all of them.
            if len(numbers) > 1 or (group.alone is None and process_count(configs[group.jobs[0]]["hardware"]) > 1):
                whole = [wholes[n] for n in numbers]
                try:
                    run_group(whole, self.task.command, self.context.callbacks, self.max_concurrent_runs, called)
                except RunFailed as error:
                    failed.append(str(error))  # the others are none the worse
                release()  # for the next one's count of what is free
                continue
            returns[numbers[0]] = self._by_itself(list(job_overrides[numbers[0]]), initial_job_idx + numbers[0])
        if failed:
            raise RunFailed(failed[0])
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
        with as_current(config):
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


def _called(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"job {numbers[0]}"
    run = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"jobs {numbers[0]}-{numbers[-1]}" if run else f"jobs {', '.join(map(str, numbers))}"
