"""Hydra launcher that runs compatible jobs of a sweep concurrently on one backbone.

torch is imported when jobs are launched, not when Hydra discovers its plugins.
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
from sdtune.runs.hydra_values import as_current
from sdtune.runs.state import finished
from sdtune.sweeps.job import Job

if TYPE_CHECKING:
    from sdtune.shared_backbone.compatibility import Group


class SharedBackboneLauncher(Launcher):  # type: ignore[misc]
    """Run jobs that can share a backbone concurrently in one process, and the other jobs one after another.

    Args:
        max_concurrent_runs: maximum number of concurrent runs per process; ``auto``: as many as fit into the device's
            memory according to ``sdtune plan``.
        processes: number of processes on a CPU, each with its own copy of the backbone; ``auto``: as many as the free
            cores and the memory allow. On GPUs, each GPU has one process.
    """

    shares_backbone: ClassVar[bool] = True
    """Whether compatible jobs share a backbone; the command validates them accordingly."""

    def __init__(
        self, max_concurrent_runs: int | Literal["auto"] = "auto", processes: int | Literal["auto"] = "auto"
    ) -> None:
        self.max_concurrent_runs, self.processes = max_concurrent_runs, processes
        self.config: DictConfig
        self.context: HydraContext
        self.task: Job

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        assert isinstance(task_function, Job), "task_function must be an sdtune Job"
        self.config, self.context, self.task = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; each job's folder records its outcome."""
        setup_globals()
        quiet()
        from sdtune.config.settings import plain
        from sdtune.shared_backbone.compatibility import groups

        quiet_libraries()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        full_configs = [
            self._full_config(list(overrides), initial_job_idx + i) for i, overrides in enumerate(job_overrides)
        ]
        returns = [JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED) for overrides in job_overrides]
        unfinished = [i for i, config in enumerate(full_configs) if not finished(Path(config.hydra.runtime.output_dir))]
        configs = []
        for number in unfinished:
            with as_current(full_configs[number]):
                configs.append(plain(full_configs[number]))
        failed: list[str] = []
        all_groups = groups(configs)
        for group in all_groups:
            numbers = [unfinished[index] for index in group.jobs]
            name = _job_names([initial_job_idx + number for number in numbers])
            if len(numbers) == 1 and len(unfinished) > 1:
                print(f"{name} runs alone: {_why_alone(group, all_groups, configs)}")
            if self._is_shared(group, configs):
                failed += self._share([full_configs[n] for n in numbers], name)
                continue
            returns[numbers[0]] = self._run_alone(list(job_overrides[numbers[0]]), initial_job_idx + numbers[0])
        if failed:
            raise RunFailed(failed[0])
        for number in set(range(len(full_configs))) - set(unfinished):
            # The run may have been completed outside the sweep; running the job again updates its state file.
            returns[number] = self._run_alone(list(job_overrides[number]), initial_job_idx + number)
        return returns

    @staticmethod
    def _is_shared(group: Group, configs: Sequence[dict[str, Any]]) -> bool:
        """Whether ``group`` uses the shared backbone; a single job does if there are several devices.

        It then uses one device, as it would in a larger group.
        """
        from sdtune.config.hardware import process_count

        has_several_devices = process_count(configs[group.jobs[0]]["hardware"]) > 1
        return len(group.jobs) > 1 or (group.alone is None and has_several_devices)

    def _share(self, full_configs: list[DictConfig], name: str) -> list[str]:
        """Run the jobs of ``full_configs`` on one backbone; return error messages, so that other groups continue."""
        from sdtune.hardware.allocator import release
        from sdtune.sweeps.shared_group import JobGroup, run_group

        try:
            group = JobGroup(full_configs, self.task.command, self.context.callbacks, self.max_concurrent_runs, name)
            run_group(group, self.processes)
        except RunFailed as error:
            return [str(error)]
        finally:
            release()  # frees memory before the next group estimates how many runs fit
        return []

    def _sweep_config(self, overrides: list[str], number: int) -> DictConfig:
        config: DictConfig = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _full_config(self, overrides: list[str], number: int) -> DictConfig:
        """Job config including Hydra's node, with the output folder set as in Hydra's ``run_job``."""
        config = self._sweep_config(overrides, number)
        with as_current(config):
            folder = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(folder.absolute())
        return config

    def _run_alone(self, overrides: list[str], number: int) -> JobReturn:
        done = run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=self._sweep_config(overrides, number),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return done


def _job_names(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"job {numbers[0]}"
    consecutive = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"jobs {numbers[0]}-{numbers[-1]}" if consecutive else f"jobs {', '.join(map(str, numbers))}"


def _why_alone(group: Group, all_groups: Sequence[Group], configs: Sequence[dict[str, Any]]) -> str:
    """Reason why the only job of ``group`` shares its backbone with no other job."""
    from sdtune.shared_backbone.compatibility import difference

    largest_group = max(all_groups, key=lambda candidate: len(candidate.jobs))
    other = next(candidate for candidate in (largest_group, *all_groups) if candidate is not group)
    key = difference(configs[group.jobs[0]], configs[other.jobs[0]])
    return group.alone or f"{key} differs from the other jobs"
