"""Optuna's trials on one backbone: one that falls behind frees its place for the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from running import arguments, rows, train
from sdtune.runs.trials import STUDY, storage
from sdtune.shared_backbone import batched_unet as joint


@pytest.mark.slow
def test_the_next_trial_takes_the_place_of_one_that_is_pruned(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    call = joint.Joint.__call__

    def spy(self: joint.Joint, pairs: Any, inputs: Any, mode: joint.Mode, seeds: Any) -> Any:
        if mode.gradients:
            widths.append(len(inputs))
        return call(self, pairs, inputs, mode, seeds)

    monkeypatch.setattr(joint.Joint, "__call__", spy)
    sweep = tmp_path / "sweep"
    own = arguments(tiny, images, tmp_path, "name=mine", "trainer.max_steps=6", f"hydra.sweep.dir={sweep}")
    own = [a for a in own if not a.startswith(("hydra.run.dir", "method.rank"))]
    own += ["sweep=optuna", "callbacks.pruning.pruner=asha", "callbacks.pruning.after=2", "data.hold_out=5"]
    own += ["trainer.val_check_interval=2", "hydra.sweeper.n_trials=6", "hydra.sweeper.at_once=6"]
    own += ["hydra/launcher=shared_backbone", "hydra.launcher.processes=1", "hydra.launcher.max_concurrent_runs=3"]
    assert train("-m", *own, "optimizer.lr=tag(log, interval(1e-4, 1e-1))", "method.rank=choice(1, 4)") == 0
    found = optuna.load_study(study_name=STUDY, storage=storage(sweep)).trials
    assert [trial.number for trial in found] == [0, 1, 2, 3, 4, 5]
    states = [trial.state for trial in found]
    assert set(states) == {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    for trial in found:
        job = sweep / str(trial.number)
        done = trial.state is optuna.trial.TrialState.COMPLETE
        assert json.loads((job / "job.json").read_text())["state"] == ("done" if done else "pruned")
        assert len([row for row in rows(job) if row["loss"]]) == (6 if done else 2)
    # The shapes of the products stay while anyone trains, whoever has left: three places, to the last step.
    assert set(widths) == {3}
    # Six trials of six steps in three places are twelve steps; those that were pruned have left theirs.
    assert len(widths) < 12
