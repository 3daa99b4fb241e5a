"""Optuna trials on a shared backbone: a new trial replaces a pruned one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from running import arguments, rows, train
from sdtune.runs.trials import STUDY, storage
from sdtune.shared_backbone import batched_denoiser as joint


@pytest.mark.slow
def test_next_trial_replaces_a_pruned_one(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_sizes: list[int] = []
    call = joint.BatchedDenoiser.__call__

    def spy(self: joint.BatchedDenoiser, pairs: Any, inputs: Any, mode: joint.Mode, seeds: Any) -> Any:
        if mode.gradients:
            batch_sizes.append(len(inputs))
        return call(self, pairs, inputs, mode, seeds)

    monkeypatch.setattr(joint.BatchedDenoiser, "__call__", spy)
    sweep = tmp_path / "sweep"
    overrides = arguments(tiny, images, tmp_path, "name=mine", "trainer.max_steps=6", f"hydra.sweep.dir={sweep}")
    overrides = [a for a in overrides if not a.startswith(("hydra.run.dir", "method.rank"))]
    overrides += ["sweep=optuna", "callbacks.pruning.pruner=asha", "callbacks.pruning.after=2", "data.hold_out=5"]
    overrides += ["trainer.val_check_interval=2", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=6"]
    overrides += [
        "hydra/launcher=shared_backbone",
        "hydra.launcher.processes=1",
        "hydra.launcher.max_concurrent_runs=3",
    ]
    assert train("-m", *overrides, "optimizer.lr=tag(log, interval(1e-4, 1e-1))", "method.rank=choice(1, 4)") == 0
    trials = optuna.load_study(study_name=STUDY, storage=storage(sweep)).trials
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4, 5]
    states = [trial.state for trial in trials]
    assert set(states) == {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    for trial in trials:
        job = sweep / str(trial.number)
        is_complete = trial.state is optuna.trial.TrialState.COMPLETE
        assert json.loads((job / "job.json").read_text(encoding="utf-8"))["state"] == (
            "done" if is_complete else "pruned"
        )
        assert len([row for row in rows(job) if row["loss"]]) == (6 if is_complete else 2)
    # Each batch has three places until the last step, also after runs have ended, so that the shapes stay equal.
    assert set(batch_sizes) == {3}
    # Six complete trials of six steps in three places would be twelve steps; pruned trials take fewer.
    assert len(batch_sizes) < 12
