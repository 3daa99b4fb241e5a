"""Hydra sweeper that searches with Optuna; it supports pruning and resuming.

Hydra's own Optuna plugin passes no trial to its jobs and always starts from zero. Optuna is imported when a sweep
starts, not when Hydra discovers its plugins.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from sdtune.errors import RunFailed, UserError
from sdtune.files import read_json
from sdtune.runs.metrics import LOWER_IS_BETTER
from sdtune.runs.state import STATE, UNFINISHED
from sdtune.runs.trials import STUDY, require_optuna, storage
from sdtune.sweeps.job import write_yaml
from sdtune.sweeps.joblib_stop import stop_code

if TYPE_CHECKING:
    import optuna

log = logging.getLogger("sdtune")

DIRECTIONS = ("minimize", "maximize")


def direction_of(metric: str) -> str:
    """Optimization direction of ``metric``: ``minimize`` or ``maximize``."""
    return "minimize" if metric in LOWER_IS_BETTER else "maximize"


def check_search(master: DictConfig, parsed: Sequence[Override]) -> None:
    """Raise UserError if the settings of a search are invalid; ``parsed`` are its overrides."""
    require_optuna()
    sweeper = master.hydra.sweeper
    if sweeper.direction not in (None, *DIRECTIONS):
        raise UserError(f"got {sweeper.direction!r}", key="hydra.sweeper.direction", remedy="set minimize or maximize")
    for key in ("n_trials", "n_jobs"):
        if not isinstance(sweeper[key], int) or sweeper[key] < 1:
            raise UserError(f"got {sweeper[key]!r}", key=f"hydra.sweeper.{key}", remedy="set an integer of at least 1")
    metric = master.get("optimized_metric")
    if not metric:
        raise UserError(
            "a search needs a metric", key="optimized_metric", remedy="set the metric of metrics.json to optimize"
        )
    if metric in LOWER_IS_BETTER and sweeper.direction == "maximize":
        raise UserError(
            f"lower values of {metric} are better", key="hydra.sweeper.direction", remedy="remove this override"
        )
    if not any(override.is_sweep_override() for override in _by_key(parsed).values()):
        raise UserError(
            "the search space is empty",
            key="hydra.sweeper.params",
            remedy="add a range, for example 'optimizer.lr=tag(log,interval(1e-5,1e-2))'",
        )


class OptunaSweeper(Sweeper):  # type: ignore[misc]
    """Search with Optuna's TPE sampler (Bergstra et al. 2011): one job per trial, study stored in the sweep's folder.

    Args:
        n_trials: total number of trials, including those of earlier starts of the sweep.
        n_jobs: number of trials that are passed to the launcher together; values above 1 help only if the launcher
            runs jobs concurrently.
        direction: ``minimize`` or ``maximize``; None: inferred from the name of ``optimized_metric``.
        seed: seed of the sampler.
        startup_trials: number of random trials before TPE is used.
        params: search space in Hydra's override syntax, for example
            ``optimizer.lr: tag(log, interval(1e-5, 1e-2))``; overrides on the command line take precedence.
    """

    def __init__(
        self,
        n_trials: int = 20,
        n_jobs: int = 1,
        direction: str | None = None,
        seed: int = 0,
        startup_trials: int = 8,
        params: DictConfig | None = None,
    ) -> None:
        self.n_trials, self.n_jobs, self.direction = n_trials, n_jobs, direction
        self.seed, self.startup_trials = seed, startup_trials
        self.params: dict[str, Any] = dict(params or {})
        self.config: DictConfig
        self.context: HydraContext
        self.launcher: Launcher

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Resume unfinished trials, then run new ones until the study has ``n_trials`` trials."""
        import optuna

        folder = Path(str(self.config.hydra.sweep.dir))
        space, fixed = self._space(arguments)
        write_yaml(folder / "multirun.yaml", self.config)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=storage(folder),
            study_name=STUDY,
            direction=self.direction or direction_of(str(self.config.optimized_metric)),  # type: ignore[arg-type]
            load_if_exists=True,
        )
        # Change the seed when a sweep is resumed: the same seed would suggest the first trials' values again.
        study.sampler = optuna.samplers.TPESampler(
            seed=self.seed + len(study.get_trials(deepcopy=False)), n_startup_trials=self.startup_trials
        )
        batch: list[tuple[int, list[str]]] = []
        for running in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if "overrides" not in running.user_attrs:  # the sweep was killed before the trial became a job
                study.tell(running.number, state=optuna.trial.TrialState.FAIL)
                continue
            # A launcher numbers jobs consecutively, starting from the number of the first one.
            if batch and (len(batch) == self.n_jobs or running.number != batch[-1][0] + 1):
                self._launch(study, folder, batch)
                batch = []
            batch.append((running.number, list(running.user_attrs["overrides"])))
        if batch:
            self._launch(study, folder, batch)
        while (remaining := self.n_trials - len(_trials_with_jobs(study))) > 0:
            new_trials = [study.ask() for _ in range(min(remaining, self.n_jobs))]
            jobs = [(trial.number, [*fixed, *_suggest(trial, space), f"trial={trial.number}"]) for trial in new_trials]
            for trial, (_, overrides) in zip(new_trials, jobs, strict=True):
                trial.set_user_attr("overrides", overrides)
            self._launch(study, folder, jobs)
        self._log_summary(study)

    def _space(self, arguments: Sequence[str]) -> tuple[dict[str, Override], list[str]]:
        """Split the overrides into the search space and those that all jobs share."""
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        parsed = parser.parse_overrides([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        by_key = _by_key(parsed)
        space = {key: override for key, override in by_key.items() if override.is_sweep_override()}
        fixed = [f"{k}={o.get_value_element_as_str()}" for k, o in by_key.items() if k not in space]
        return space, fixed

    def _launch(self, study: optuna.Study, folder: Path, jobs: Sequence[tuple[int, list[str]]]) -> None:
        try:
            self.launcher.launch([overrides for _, overrides in jobs], initial_job_idx=jobs[0][0])
        except (SystemExit, RunFailed):
            # A recorded failure may be from an earlier start or from a lack of memory; the trial runs again on resume.
            self._report_outcomes(study, folder, jobs, resumable=(UNFINISHED, "failed"))
            raise
        stopped = stop_code(folder)
        self._report_outcomes(study, folder, jobs, resumable=() if stopped is None else (UNFINISHED,))
        if stopped is not None:
            raise SystemExit(stopped)

    def _report_outcomes(
        self, study: optuna.Study, folder: Path, jobs: Sequence[tuple[int, list[str]]], resumable: tuple[str, ...]
    ) -> None:
        """Report the outcomes of ``jobs`` to the study, except states in ``resumable``: those jobs run again."""
        from optuna.trial import TrialState

        for number, _ in jobs:
            # Read the outcome from the job's folder, because the job may have run in another process.
            file = folder / str(number) / STATE
            if resumable and not file.is_file():
                continue
            state = read_json(file, "resume")
            if state["state"] in resumable:
                continue
            outcome = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(state["state"], TrialState.FAIL)
            value = state.get("metric")
            if outcome is TrialState.COMPLETE and value is None:
                self._check_metric(folder / str(number))
                log.info("job %d: %s is null; the trial counts as failed", number, self.config.optimized_metric)
                outcome = TrialState.FAIL
            study.tell(number, value if outcome is TrialState.COMPLETE else None, outcome)

    def _check_metric(self, run: Path) -> None:
        """Raise UserError if the run lacks the metric, even as null: it is misspelled, so no trial will have it."""
        metrics = read_json(run / "metrics.json", "resume")
        metric = str(self.config.optimized_metric)
        if metric not in metrics:
            known = [key for key, value in metrics.items() if isinstance(value, int | float)]
            raise UserError(
                f"unknown metric {metric}, {run} has others", key="optimized_metric", remedy=f"use {' or '.join(known)}"
            )

    def _log_summary(self, study: optuna.Study) -> None:
        from optuna.trial import TrialState

        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        log.info("optuna: %d trials complete, %d pruned", len(done), len(pruned))
        if done:
            best = study.best_trial
            params = " ".join(f"{key}={value}" for key, value in best.params.items())
            log.info("best: job %d, %s %.6g: %s", best.number, self.config.optimized_metric, best.value, params)


def _trials_with_jobs(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.get_trials(deepcopy=False) if "overrides" in trial.user_attrs]


def _by_key(parsed: Sequence[Override]) -> dict[str, Override]:
    """The last override of each key, which takes precedence."""
    return {override.get_key_element(): override for override in parsed}


def example(parsed: Sequence[Override]) -> list[str]:
    """Overrides of one possible job of the search: first value of each choice, lower bound of each interval."""
    return [f"{key}={_first(override)}" for key, override in _by_key(parsed).items()]


def _first(override: Override) -> Any:
    value = override.value()
    if not override.is_sweep_override():
        return override.get_value_element_as_str()
    if isinstance(value, IntervalSweep | RangeSweep):
        return value.start
    return next(iter(override.sweep_string_iterator()))


def _suggest(trial: optuna.Trial, space: dict[str, Override]) -> list[str]:
    return [f"{key}={suggest_value(trial, key, override)}" for key, override in space.items()]


def suggest_value(trial: optuna.Trial, key: str, override: Override) -> Any:
    """Have ``trial`` suggest a value of ``key`` from the sweep in ``override``."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return trial.suggest_categorical(key, [str(choice) for choice in override.sweep_string_iterator()])
    assert isinstance(value, IntervalSweep | RangeSweep)
    log_scale = "log" in value.tags
    if isinstance(value, RangeSweep):
        start, stop, step = value.start, value.stop, value.step
        assert start is not None
        assert stop is not None
        if all(isinstance(number, int) for number in (start, stop, step)):
            return trial.suggest_int(key, int(start), int(stop) - 1, step=int(step))
        count = math.ceil((float(stop) - float(start)) / float(step) - 1e-9)  # Hydra's ranges exclude their stop
        return trial.suggest_float(key, float(start), float(start) + (count - 1) * float(step), step=float(step))
    assert value.start is not None
    assert value.end is not None
    if isinstance(value.start, int) and isinstance(value.end, int):
        return trial.suggest_int(key, value.start, value.end, log=log_scale)
    return trial.suggest_float(key, float(value.start), float(value.end), log=log_scale)
