"""Search with sweep=optuna: sampling, pruning, the summary, and resuming a killed search."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from running import arguments, rows, start, train, wait_for_step
from sdtune.callbacks import pruning
from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.errors import Pruned
from sdtune.runs.trials import STUDY, storage
from sdtune.sweeps.optuna_sweeper import direction_of, suggest_value
from wandb_files import told


@pytest.fixture
def settings(tiny: Path, images: Path, tmp_path: Path) -> list[str]:
    overrides = arguments(
        tiny, images, tmp_path, "name=mine", "trainer.max_steps=6", f"hydra.sweep.dir={tmp_path}/sweep"
    )
    overrides = [a for a in overrides if not a.startswith(("hydra.run.dir", "method.rank"))]
    search = ["sweep=optuna", "trainer.val_check_interval=2", "data.hold_out=5", "hydra.sweeper.n_trials=5"]
    search += ["hydra.sweeper.startup_trials=3", "callbacks.pruning.after=2"]
    return ["-m", *overrides, *search, "optimizer.lr=tag(log, interval(1e-3, 1e-1))", "method.rank=choice(1, 2)"]


def trials(sweep: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=STUDY, storage=storage(sweep)).trials


@pytest.mark.slow
def test_search_reports_its_best_trial(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep"
    assert train(*settings) == 0
    output = capsys.readouterr().out
    study_trials = trials(sweep)
    assert [t.number for t in study_trials] == [0, 1, 2, 3, 4]
    complete = [t for t in study_trials if t.state is optuna.trial.TrialState.COMPLETE]
    assert len(complete) >= 2
    for trial in study_trials:
        job = sweep / str(trial.number)
        rates = [float(r["lr/denoiser"]) for r in rows(job) if r["lr/denoiser"]]
        assert rates == [pytest.approx(trial.params["optimizer.lr"])] * len(rates)
        assert 1e-3 <= trial.params["optimizer.lr"] <= 1e-1
        state = json.loads((job / "job.json").read_text(encoding="utf-8"))["state"]
        assert state == {"COMPLETE": "done", "PRUNED": "pruned"}[trial.state.name]
        validation_losses = {int(r["step"]): float(r["validation_loss"]) for r in rows(job) if r["validation_loss"]}
        assert trial.intermediate_values == validation_losses
    for trial in complete:
        assert (
            trial.value
            == json.loads((sweep / str(trial.number) / "metrics.json").read_text(encoding="utf-8"))["validation_loss"]
        )
    best = min(complete, key=lambda t: t.value)
    assert f"best: job {best.number}, validation_loss {best.value:.6g}: " in output
    assert f"optuna: {len(complete)} trials complete, {5 - len(complete)} pruned" in output
    ages = [f.stat().st_mtime_ns for f in sorted(sweep.glob("*/metrics.csv"))]
    assert train("-m", f"resume={sweep}") == 0, "all trials are complete"
    assert [f.stat().st_mtime_ns for f in sorted(sweep.glob("*/metrics.csv"))] == ages


@pytest.mark.slow
def test_trial_that_does_not_learn_is_pruned(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two trials that learn, then one with a learning rate near zero."""
    sweep = tmp_path / "sweep"
    common = [a for a in settings if not a.startswith(("optimizer.lr", "method.rank"))]
    assert train(*common, "method.rank=2", "optimizer.lr=choice(1e-2, 1e-2)", "hydra.sweeper.n_trials=2") == 0
    common = [*common, "method.rank=2", "optimizer.lr=choice(1e-2, 1e-2)"]
    study = optuna.load_study(study_name=STUDY, storage=storage(sweep))
    assert {t.state.name for t in study.trials} == {"COMPLETE"}
    trial = study.ask()  # a third trial, added manually, that does not learn
    overrides = [o for o in study.trials[0].user_attrs["overrides"] if not o.startswith(("optimizer.lr", "trial="))]
    trial.set_user_attr("overrides", [*overrides, "optimizer.lr=1e-12", "trial=2"])
    assert train("-m", f"resume={sweep}") == 0
    pruned = trials(sweep)[2]
    assert pruned.state is optuna.trial.TrialState.PRUNED
    assert json.loads((sweep / "2" / "job.json").read_text(encoding="utf-8"))["state"] == "pruned"
    assert (
        len([r for r in rows(sweep / "2") if r["loss"]])
        == json.loads((sweep / "2" / "job.json").read_text(encoding="utf-8"))["step"]
        < 6
    )
    assert "sweep: 2 of 3 jobs are done, 1 pruned" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_search_resumes_its_unfinished_trials(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [
        "callbacks.pruning=null",
        "checkpoint.every_steps=2",
        "trainer.max_steps=20",
        "hydra.sweeper.n_trials=3",
    ]
    process = start(log, *settings, *overrides)
    wait_for_step(process, sweep / "1", 5, log)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = [(t.params, t.state.name) for t in trials(sweep)]
    assert [state for _, state in before] == ["COMPLETE", "RUNNING"]
    age = (sweep / "0" / "metrics.json").stat().st_mtime_ns
    assert train("-m", f"resume={sweep}") == 0
    after = trials(sweep)
    assert [t.params for t in after][:2] == [params for params, _ in before]
    assert [t.state.name for t in after] == ["COMPLETE"] * 3
    assert (sweep / "0" / "metrics.json").stat().st_mtime_ns == age
    assert [int(r["step"]) for r in rows(sweep / "1") if r["loss"]] == list(range(1, 21))
    assert "resuming at step" in (sweep / "1" / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimized_metric=null"], "optimized_metric: a search needs a metric"),
        (["hydra.sweeper.direction=up"], "hydra.sweeper.direction: got 'up'; set minimize or maximize"),
        (["hydra.sweeper.direction=maximize"], "hydra.sweeper.direction: lower values of validation_loss are better"),
        (["hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials: got 0; set an integer of at least 1"),
        (
            ["hydra.sweeper.params=null", "optimizer.lr=1e-3", "method.rank=2"],
            "hydra.sweeper.params: the search space is empty",
        ),
    ],
)
def test_invalid_search_is_refused(
    overrides: list[str], message: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*settings, *overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sdtune: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_missing_optuna_is_refused_before_a_folder_is_created(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else find(name, *rest)
    )
    assert train(*settings, f"hydra.sweep.dir={tmp_path}/sweep") == 2
    assert "sweep: Optuna is not installed; pip install 'sdtune[sweeps]'" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_example_job_is_checked_before_the_search_starts(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*settings, "data.hold_out=null") == 2
    error = capsys.readouterr().err
    assert error.startswith("sdtune: the search's jobs: callbacks.pruning")
    assert "callbacks.pruning: no image is held out" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_misspelled_metric_is_refused_before_the_first_job(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["callbacks.pruning=null", "trainer.max_steps=1", "hydra.sweeper.n_trials=3"]
    assert train(*settings, *overrides, "optimized_metric=step") == 2
    error = capsys.readouterr().err
    assert error.startswith("sdtune: the search's jobs: optimized_metric: unknown metric step; did you mean steps?")
    assert error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_extended_search_skips_a_trial_without_a_job(settings: list[str], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    assert train(*settings, "callbacks.pruning=null", "trainer.max_steps=2", "hydra.sweeper.n_trials=2") == 0
    optuna.load_study(study_name=STUDY, storage=storage(sweep)).ask()  # as if killed before the trial became a job
    (sweep / "1" / "job.json").unlink()  # as if killed between the last file of the run and that of the job
    assert train("-m", f"resume={sweep}", "hydra.sweeper.n_trials=3") == 0
    study_trials = trials(sweep)
    assert [t.state.name for t in study_trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert len({str(t.params) for t in study_trials if t.params}) == 3, "no point is sampled twice"


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(("loss", "is_pruned"), [(0.9, True), (0.1, False)])
def test_pruning_minimizes_the_loss_for_either_search_direction(
    direction: str, loss: float, is_pruned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "check_held_out", lambda *args: None)
    study = optuna.create_study(storage=storage(tmp_path), study_name=STUDY, direction=direction)
    recorder = MetricsRecorder(tmp_path / "run")
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=1, max_steps=9, world_size=1, sanity_checking=False)

    def report(value: float) -> None:
        number = study.ask().number
        callback = pruning.Pruning(tmp_path / str(number), recorder, number, after=2)
        callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
        recorder.validation = {1: value}
        callback.on_validation_end(trainer, None)  # type: ignore[arg-type]

    for value in (0.5, 0.6):
        report(value)
        study.tell(study.trials[-1].number, 1.0)
    if is_pruned:
        with pytest.raises(Pruned):
            report(loss)
    else:
        report(loss)


def test_asha_keeps_the_best_third_of_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "check_held_out", lambda *args: None)
    study = optuna.create_study(storage=storage(tmp_path), study_name=STUDY, direction="minimize")
    recorder = MetricsRecorder(tmp_path / "run")
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=2, max_steps=9, world_size=1, sanity_checking=False)
    pruned = []
    for value in (0.5, 0.6, 0.7, 0.4):
        number = study.ask().number
        callback = pruning.Pruning(tmp_path / str(number), recorder, number, pruner="asha", after=2)
        callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
        recorder.validation = {2: value}
        try:
            callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
        except Pruned:
            pruned.append(value)
    assert pruned == [0.6, 0.7], "the first has no other trial to be compared with, and the last is the best"


def test_range_excludes_its_stop_as_in_hydra(settings: list[str]) -> None:
    parser = OverridesParser.create()
    [integers, floats] = parser.parse_overrides(["method.rank=range(1,4)", "optimizer.lr=range(0.0,1.0,0.25)"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    sampled = [
        {str(suggest_value(trial, key, o)) for trial in (study.ask() for _ in range(60))}
        for key, o in (("rank", integers), ("lr", floats))
    ]
    assert sampled == [{"1", "2", "3"}, {"0.0", "0.25", "0.5", "0.75"}]


def test_direction_follows_from_the_metric_name() -> None:
    assert [direction_of(metric) for metric in ("validation_loss", "subject_gain")] == ["minimize", "maximize"]


@pytest.mark.slow
def test_pruned_job_on_two_devices_closes_its_loggers(settings: list[str], tmp_path: Path) -> None:
    """The end of the other rank must not kill rank 0, which still has to finish its W&B run."""
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    sweep.mkdir()
    study = optuna.create_study(storage=storage(sweep), study_name=STUDY, direction="minimize")
    better = optuna.trial.create_trial(value=0.0, intermediate_values={2: 0.0, 4: 0.0})
    study.add_trial(better)
    overrides = [a for a in settings if a != "hardware=cpu"]
    overrides += ["hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2", "data.batch_size=4"]
    overrides += ["hydra.sweeper.n_trials=1", "callbacks.pruning.after=1", "logger=wandb", "logger.wandb.offline=true"]
    process = start(log, *overrides)
    assert process.wait(timeout=280) == 0, log.read_text(encoding="utf-8")
    assert json.loads((sweep / "1" / "job.json").read_text(encoding="utf-8")) | {"overrides": None} == {
        "overrides": None,
        "state": "pruned",
        "step": 2,
    }
    assert trials(sweep)[1].state is optuna.trial.TrialState.PRUNED
    assert told(sweep / "1")["exit"] == 0
