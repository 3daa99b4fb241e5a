"""Hydra sweeper on Optuna, with pruning and resuming.

The published plugin gives its jobs no trial and starts from zero. Optuna is imported when a sweep begins, so that
Hydra's search for plugins costs nothing.
"""

from __future__ import annotations

import json
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
from sdtune.runs.metrics import LOWER_IS_BETTER
from sdtune.runs.state import STATE, UNFINISHED
from sdtune.runs.trials import STUDY, require_optuna, storage
from sdtune.sweeps.job import write_yaml
from sdtune.sweeps.joblib_stop import stopping

if TYPE_CHECKING:
    import optuna

log = logging.getLogger("sdtune")

DIRECTIONS = ("minimize", "maximize")


def direction_of(metric: str) -> str:
    """``minimize`` or ``maximize``, by the name of the metric."""
    return "minimize" if metric in LOWER_IS_BETTER else "maximize"


def check_search(master: DictConfig, parsed: Sequence[Override]) -> None:
    """UserError for a search that cannot begin; ``parsed`` are its overrides."""
    require_optuna()
    sweeper = master.hydra.sweeper
    if sweeper.direction not in (None, *DIRECTIONS):
        raise UserError(f"{sweeper.direction!r}", key="hydra.sweeper.direction", remedy="give minimize or maximize")
    for key in ("n_trials", "at_once"):
        if not isinstance(sweeper[key], int) or sweeper[key] < 1:
            raise UserError(f"{sweeper[key]!r}", key=f"hydra.sweeper.{key}", remedy="give at least 1")
    metric = master.get("optimized_metric")
    if not metric:
        raise UserError("optimized_metric is missing: name the metric of metrics.json that Optuna shall improve")
    if metric in LOWER_IS_BETTER and sweeper.direction == "maximize":
        raise UserError(f"{metric} is the better the lower", key="hydra.sweeper.direction", remedy="leave it out")
    if not any(override.is_sweep_override() for override in _by_key(parsed).values()):
        raise UserError(
            "nothing is searched",
            key="hydra.sweeper.params",
            remedy="give such as 'optimizer.lr=tag(log,interval(1e-5,1e-2))'",
        )


class OptunaSweeper(Sweeper):  # type: ignore[misc]
    """Chooses settings by Optuna's TPE (Bergstra et al. 2011), one trial per job, the study in the sweep's own folder.

    Args:
        n_trials: how many in all, those of an earlier start included.
        at_once: jobs that the launcher gets together; more than one only helps with one that runs them side by side.
        direction: of the metric that ``optimized_metric`` names: ``minimize``, ``maximize``, or by its name if None.
        seed: of the sampler.
        startup_trials: so many are drawn at random before the model decides.
        params: search space in Hydra's words: ``optimizer.lr: tag(log, interval(1e-5, 1e-2))``; the command line's
            overrides come on top.
    """

    def __init__(
        self,
        n_trials: int = 20,
        at_once: int = 1,
        direction: str | None = None,
        seed: int = 0,
        startup_trials: int = 8,
        params: DictConfig | None = None,
    ) -> None:
        self.n_trials, self.at_once, self.direction = n_trials, at_once, direction
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
        """Run trials until there are ``n_trials`` that have ended."""
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
        # Another seed after a stop: the same one would draw again what it drew at the start.
        study.sampler = optuna.samplers.TPESampler(
            seed=self.seed + len(study.get_trials(deepcopy=False)), n_startup_trials=self.startup_trials
        )
        together: list[tuple[int, list[str]]] = []
        for begun in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if "overrides" not in begun.user_attrs:  # killed before it was a job
                study.tell(begun.number, state=optuna.trial.TrialState.FAIL)
                continue
            # A launcher counts its jobs on from the first one's number.
            if together and (len(together) == self.at_once or begun.number != together[-1][0] + 1):
                self._launch(study, folder, together)
                together = []
            together.append((begun.number, list(begun.user_attrs["overrides"])))
        if together:
            self._launch(study, folder, together)
        while (left := self.n_trials - len(_jobs(study))) > 0:
            asked = [study.ask() for _ in range(min(left, self.at_once))]
            jobs = [(trial.number, [*fixed, *_suggest(trial, space), f"trial={trial.number}"]) for trial in asked]
            for trial, (_, overrides) in zip(asked, jobs, strict=True):
                trial.set_user_attr("overrides", overrides)
            self._launch(study, folder, jobs)
        self._say(study)

    def _space(self, arguments: Sequence[str]) -> tuple[dict[str, Override], list[str]]:
        """What is searched, and what is the same for all jobs."""
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
            # What says that it failed may be of a start before, or have had too little room; it is tried once more.
            self._tell(study, folder, jobs, goes_on=(UNFINISHED, "failed"))
            raise
        stopped = stopping(folder)
        self._tell(study, folder, jobs, goes_on=() if stopped is None else (UNFINISHED,))
        if stopped is not None:
            raise SystemExit(stopped)

    def _tell(
        self, study: optuna.Study, folder: Path, jobs: Sequence[tuple[int, list[str]]], goes_on: tuple[str, ...]
    ) -> None:
        """Tell the study how trials ended, but for those that go on when the sweep does."""
        from optuna.trial import TrialState

        for number, _ in jobs:
            # The job's own folder says how it ended: it may have run in another process.
            file = folder / str(number) / STATE
            if goes_on and not file.is_file():
                continue
            state = json.loads(file.read_text())
            if state["state"] in goes_on:
                continue
            ended = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(state["state"], TrialState.FAIL)
            value = state.get("metric")
            if ended is TrialState.COMPLETE and value is None:
                self._refuse_unknown(folder / str(number))
                log.info("job %d: %s is null, which counts as a failure", number, self.config.optimized_metric)
                ended = TrialState.FAIL
            study.tell(number, value if ended is TrialState.COMPLETE else None, ended)

    def _refuse_unknown(self, run: Path) -> None:
        """A metric that the run does not even have null is misspelt, and no later trial will have it."""
        found = json.loads((run / "metrics.json").read_text())
        wanted = str(self.config.optimized_metric)
        if wanted not in found:
            known = [key for key, value in found.items() if isinstance(value, int | float)]
            raise UserError(f"{wanted}: there is no such metric; {run} has {', '.join(known)}", key="optimized_metric")

    def _say(self, study: optuna.Study) -> None:
        from optuna.trial import TrialState

        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        log.info("optuna: %d trials complete, %d pruned", len(done), len(pruned))
        if done:
            best = study.best_trial
            chosen = " ".join(f"{key}={value}" for key, value in best.params.items())
            log.info("best: job %d, %s %.6g: %s", best.number, self.config.optimized_metric, best.value, chosen)


def _jobs(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.get_trials(deepcopy=False) if "overrides" in trial.user_attrs]


def _by_key(parsed: Sequence[Override]) -> dict[str, Override]:
    """The last override of each key, which counts."""
    return {override.get_key_element(): override for override in parsed}


def example(parsed: Sequence[Override]) -> list[str]:
    """Overrides of a job that the search could ask for: the first of every choice, the lower end of every interval."""
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
    """What ``trial`` tries for ``key`` within the sweep ``override``."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return trial.suggest_categorical(key, [str(one) for one in override.sweep_string_iterator()])
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
