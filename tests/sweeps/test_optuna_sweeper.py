"""sweep=optuna: it searches, prunes, says the best, and goes on where it was killed."""

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
    own = arguments(tiny, images, tmp_path, "name=mine", "trainer.max_steps=6", f"hydra.sweep.dir={tmp_path}/sweep")
    own = [a for a in own if not a.startswith(("hydra.run.dir", "method.rank"))]
    more = ["sweep=optuna", "trainer.val_check_interval=2", "data.hold_out=5", "hydra.sweeper.n_trials=5"]
    more += ["hydra.sweeper.startup_trials=3", "callbacks.pruning.after=2"]
    return ["-m", *own, *more, "optimizer.lr=tag(log, interval(1e-3, 1e-1))", "method.rank=choice(1, 2)"]


def trials(sweep: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=STUDY, storage=storage(sweep)).trials


def test_it_searches_and_says_the_best(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep"
    assert train(*settings) == 0
    said = capsys.readouterr().out
    found = trials(sweep)
    assert [t.number for t in found] == [0, 1, 2, 3, 4]
    done = [t for t in found if t.state is optuna.trial.TrialState.COMPLETE]
    assert len(done) >= 2
    for trial in found:
        job = sweep / str(trial.number)
        used = [float(r["lr/unet"]) for r in rows(job) if r["lr/unet"]]
        assert used == [pytest.approx(trial.params["optimizer.lr"])] * len(used)
        assert 1e-3 <= trial.params["optimizer.lr"] <= 1e-1
        state = json.loads((job / "job.json").read_text())["state"]
        assert state == {"COMPLETE": "done", "PRUNED": "pruned"}[trial.state.name]
        measured = {int(r["step"]): float(r["validation_loss"]) for r in rows(job) if r["validation_loss"]}
        assert trial.intermediate_values == measured
    for trial in done:
        assert trial.value == json.loads((sweep / str(trial.number) / "metrics.json").read_text())["validation_loss"]
    best = min(done, key=lambda t: t.value)
    assert f"best: job {best.number}, validation_loss {best.value:.6g}: " in said
    assert f"optuna: {len(done)} trials complete, {5 - len(done)} pruned" in said
    ages = [f.stat().st_mtime_ns for f in sorted(sweep.glob("*/metrics.csv"))]
    assert train("-m", f"resume={sweep}") == 0, "nothing remains"
    assert [f.stat().st_mtime_ns for f in sorted(sweep.glob("*/metrics.csv"))] == ages


def test_what_falls_behind_is_pruned(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rates by turns: two that learn, then none at all."""
    sweep = tmp_path / "sweep"
    own = [a for a in settings if not a.startswith(("optimizer.lr", "method.rank"))]
    assert train(*own, "method.rank=2", "optimizer.lr=choice(1e-2, 1e-2)", "hydra.sweeper.n_trials=2") == 0
    own = [*own, "method.rank=2", "optimizer.lr=choice(1e-2, 1e-2)"]
    study = optuna.load_study(study_name=STUDY, storage=storage(sweep))
    assert {t.state.name for t in study.trials} == {"COMPLETE"}
    trial = study.ask()  # a third one, put there by hand: it does not learn
    overrides = [o for o in study.trials[0].user_attrs["overrides"] if not o.startswith(("optimizer.lr", "trial="))]
    trial.set_user_attr("overrides", [*overrides, "optimizer.lr=1e-12", "trial=2"])
    assert train("-m", f"resume={sweep}") == 0
    last = trials(sweep)[2]
    assert last.state is optuna.trial.TrialState.PRUNED
    assert json.loads((sweep / "2" / "job.json").read_text())["state"] == "pruned"
    assert (
        len([r for r in rows(sweep / "2") if r["loss"]])
        == json.loads((sweep / "2" / "job.json").read_text())["step"]
        < 6
    )
    assert "sweep: 2 of 3 jobs are done, 1 pruned" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_it_goes_on_with_what_remains(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = ["callbacks.pruning=null", "checkpoint.every_steps=2", "trainer.max_steps=20", "hydra.sweeper.n_trials=3"]
    process = start(log, *settings, *own)
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
    assert "resuming at step" in (sweep / "1" / "train.log").read_text()


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["optimized_metric=null"], "optimized_metric is missing"),
        (["hydra.sweeper.direction=up"], "hydra.sweeper.direction: 'up'; give minimize or maximize"),
        (["hydra.sweeper.direction=maximize"], "hydra.sweeper.direction: validation_loss is the better the lower"),
        (["hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials: 0; give at least 1"),
        (
            ["hydra.sweeper.params=null", "optimizer.lr=1e-3", "method.rank=2"],
            "hydra.sweeper.params: nothing is searched",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(
    own: list[str], words: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*settings, *own) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sdtune: {words}")
    assert said.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_without_optuna_nothing_is_left_behind(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else find(name, *rest)
    )
    assert train(*settings, f"hydra.sweep.dir={tmp_path}/sweep") == 2
    assert "sweep=optuna needs Optuna; pip install 'sdtune[sweeps]'" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_search_is_tried_on_one_example_before_it_begins(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*settings, "data.hold_out=null") == 2
    said = capsys.readouterr().err
    assert said.startswith("sdtune: the search's jobs: callbacks.pruning")
    assert "callbacks.pruning: no image is held out to judge by" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_a_misspelt_metric_is_refused_before_the_first_job(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["callbacks.pruning=null", "trainer.max_steps=1", "hydra.sweeper.n_trials=3"]
    assert train(*settings, *own, "optimized_metric=step") == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "sdtune: the search's jobs: optimized_metric: step: there is no such metric; did you mean steps?"
    )
    assert said.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_search_is_extended_and_passes_over_a_trial_that_was_no_job_yet(settings: list[str], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    assert train(*settings, "callbacks.pruning=null", "trainer.max_steps=2", "hydra.sweeper.n_trials=2") == 0
    optuna.load_study(study_name=STUDY, storage=storage(sweep)).ask()  # and killed there
    (sweep / "1" / "job.json").unlink()  # killed between the run's last file and the job's
    assert train("-m", f"resume={sweep}", "hydra.sweeper.n_trials=3") == 0
    found = trials(sweep)
    assert [t.state.name for t in found] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert len({str(t.params) for t in found if t.params}) == 3, "no point is drawn twice"


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(("loss", "ends"), [(0.9, True), (0.1, False)])
def test_the_loss_is_better_the_lower_whatever_is_searched_for(
    direction: str, loss: float, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "check_held_out", lambda *args: None)
    study = optuna.create_study(storage=storage(tmp_path), study_name=STUDY, direction=direction)
    record = MetricsRecorder(tmp_path / "run")
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=1, max_steps=9, world_size=1, sanity_checking=False)

    def report(value: float) -> None:
        number = study.ask().number
        callback = pruning.Pruning(tmp_path / str(number), record, number, after=2)
        callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
        record.validation = {1: value}
        callback.on_validation_end(trainer, None)  # type: ignore[arg-type]

    for value in (0.5, 0.6):
        report(value)
        study.tell(study.trials[-1].number, 1.0)
    if ends:
        with pytest.raises(Pruned):
            report(loss)
    else:
        report(loss)


def test_asha_keeps_the_best_third_at_its_rungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "check_held_out", lambda *args: None)
    study = optuna.create_study(storage=storage(tmp_path), study_name=STUDY, direction="minimize")
    record = MetricsRecorder(tmp_path / "run")
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=2, max_steps=9, world_size=1, sanity_checking=False)
    ended = []
    for value in (0.5, 0.6, 0.7, 0.4):
        number = study.ask().number
        callback = pruning.Pruning(tmp_path / str(number), record, number, pruner="asha", after=2)
        callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
        record.validation = {2: value}
        try:
            callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
        except Pruned:
            ended.append(value)
    assert ended == [0.6, 0.7], "the first has nobody to be compared with, and the last is the best"


def test_ranges_exclude_their_stop_as_in_hydra(settings: list[str]) -> None:
    parser = OverridesParser.create()
    [whole, part] = parser.parse_overrides(["method.rank=range(1,4)", "optimizer.lr=range(0.0,1.0,0.25)"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [
        {str(suggest_value(trial, key, o)) for trial in (study.ask() for _ in range(60))}
        for key, o in (("rank", whole), ("lr", part))
    ]
    assert drawn == [{"1", "2", "3"}, {"0.0", "0.25", "0.5", "0.75"}]


def test_the_metrics_name_says_which_way_it_goes() -> None:
    assert [direction_of(metric) for metric in ("validation_loss", "subject_gain")] == ["minimize", "maximize"]


@pytest.mark.slow
def test_a_job_of_two_devices_is_pruned_by_both_and_closes_its_loggers(settings: list[str], tmp_path: Path) -> None:
    """The first process must not be killed for the others' end: it has W&B to finish."""
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    sweep.mkdir()
    study = optuna.create_study(storage=storage(sweep), study_name=STUDY, direction="minimize")
    better = optuna.trial.create_trial(value=0.0, intermediate_values={2: 0.0, 4: 0.0})
    study.add_trial(better)
    own = [a for a in settings if a != "hardware=cpu"]
    own += ["hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2", "data.batch_size=4"]
    own += ["hydra.sweeper.n_trials=1", "callbacks.pruning.after=1", "logger=wandb", "logger.wandb.offline=true"]
    process = start(log, *own)
    assert process.wait(timeout=280) == 0, log.read_text()
    assert json.loads((sweep / "1" / "job.json").read_text()) | {"overrides": None} == {
        "overrides": None,
        "state": "pruned",
        "step": 2,
    }
    assert trials(sweep)[1].state is optuna.trial.TrialState.PRUNED
    assert told(sweep / "1")["exit"] == 0
