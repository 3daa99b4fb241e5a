"""Hydra launcher that runs jobs of a sweep together on one backbone.

torch is imported when jobs are launched, so that Hydra's search for plugins costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from sdtune.errors import RunFailed
from sdtune.log_filters import quiet, quiet_libraries
from sdtune.runs.state import finished
from sdtune.sweeps.job import Job, as_current

if TYPE_CHECKING:
    from sdtune.shared_backbone.compatibility import Group


class SharedBackboneLauncher(Launcher):  # type: ignore[misc]
    """Runs jobs that may share a backbone at once, in one process, and the others one after another.

    Args:
        max_concurrent_runs: how many at once in each process; ``auto``: as many as the device's memory holds by the
            count of ``sdtune plan``.
        processes: over how many processes the jobs are shared out on a CPU, each with a backbone of its own; ``auto``:
            one for each free core, where the memory holds them. On GPUs it is one for each GPU.
    """

    shares_backbone: ClassVar[bool] = True
    """Whether jobs that may share a backbone do, and are checked as such."""

    def __init__(
        self, max_concurrent_runs: int | Literal["auto"] = "auto", processes: int | Literal["auto"] = "auto"
    ) -> None:
        self.max_concurrent_runs, self.processes = max_concurrent_runs, processes
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
        from sdtune.config.settings import plain
        from sdtune.shared_backbone.compatibility import groups

        quiet_libraries()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        wholes = [self._whole(list(each), initial_job_idx + i) for i, each in enumerate(job_overrides)]
        returns = [JobReturn(overrides=list(each), status=JobStatus.COMPLETED) for each in job_overrides]
        left = [i for i, whole in enumerate(wholes) if not finished(Path(whole.hydra.runtime.output_dir))]
        configs = []
        for number in left:
            with as_current(wholes[number]):
                configs.append(plain(wholes[number]))
        failed: list[str] = []
        found = groups(configs)
        for group in found:
            numbers = [left[place] for place in group.jobs]
            called = _called([initial_job_idx + number for number in numbers])
            if len(numbers) == 1 and len(left) > 1:
                print(f"{called} by itself: {_why_alone(group, found, configs)}")
            if self._is_shared(group, configs):
                failed += self._share([wholes[n] for n in numbers], called)
                continue
            returns[numbers[0]] = self._by_itself(list(job_overrides[numbers[0]]), initial_job_idx + numbers[0])
        if failed:
            raise RunFailed(failed[0])
        for number in set(range(len(wholes))) - set(left):
            # Its state file may be another's: the run was completed by itself.
            returns[number] = self._by_itself(list(job_overrides[number]), initial_job_idx + number)
        return returns

    @staticmethod
    def _is_shared(group: Group, configs: Sequence[dict[str, Any]]) -> bool:
        """Whether ``group`` goes through the shared backbone: one job has the device that it would have had among
        others, and not all of them.
        """
        from sdtune.config.hardware import process_count

        several = process_count(configs[group.jobs[0]]["hardware"]) > 1
        return len(group.jobs) > 1 or (group.alone is None and several)

    def _share(self, wholes: list[DictConfig], called: str) -> list[str]:
        """Run ``wholes`` on one backbone; why they failed, if they did: other groups are none the worse."""
        from sdtune.hardware.allocator import release
        from sdtune.sweeps.shared_group import JobGroup, run_group

        try:
            group = JobGroup(wholes, self.task.command, self.context.callbacks, self.max_concurrent_runs, called)
            run_group(group, self.processes)
        except RunFailed as error:
            return [str(error)]
        finally:
            release()  # for the next one's count of what is free
        return []

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


def _why_alone(group: Group, found: Sequence[Group], configs: Sequence[dict[str, Any]]) -> str:
    """Why the only job of ``group`` shares its backbone with none of the others."""
    from sdtune.shared_backbone.compatibility import difference

    largest = max(found, key=lambda each: len(each.jobs))
    other = next(each for each in (largest, *found) if each is not group)
    key = difference(configs[group.jobs[0]], configs[other.jobs[0]])
    return group.alone or f"{key} is another than the others'"
