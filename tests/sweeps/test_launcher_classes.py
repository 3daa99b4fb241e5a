"""What a launcher or sweeper is, is asked of its class; joblib's jobs share out the cores."""

from __future__ import annotations

import os

import pytest
from omegaconf import OmegaConf

from sdtune.errors import UserError
from sdtune.hardware import threads
from sdtune.sweeps.launchers import is_joblib, is_slurm, plugin, shared_out_cores
from sdtune.sweeps.optuna_sweeper import OptunaSweeper
from sdtune.sweeps.shared_launcher import SharedBackboneLauncher

TARGETS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "slurm": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    "local": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "shared": "hydra_plugins.sdtune_launcher.SharedBackboneLauncher",
    "optuna": "hydra_plugins.sdtune_sweeper.OptunaSweeper",
    "basic": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_class_says_what_it_is(name: str) -> None:
    kind = plugin(OmegaConf.create({"_target_": TARGETS[name]}))
    assert is_joblib(kind) is (name == "joblib")
    assert is_slurm(kind) is (name == "slurm")
    assert issubclass(kind, SharedBackboneLauncher) is (name == "shared")
    assert issubclass(kind, OptunaSweeper) is (name == "optuna")


def test_a_class_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="hydra: hydra_plugins.none.Launcher cannot be imported"):
        plugin(OmegaConf.create({"_target_": "hydra_plugins.none.Launcher"}))


@pytest.mark.parametrize(
    ("n_jobs", "jobs", "asked", "expected"),
    [
        (-1, 8, "auto", (True, "4", "1")),
        (-1, 2, "auto", (True, "2", "2")),
        (-1, 1, "auto", (False, "1", "4")),
        (-1, 8, 2, (True, "2", "2")),
        (-1, 8, 16, (False, "1", "16")),
        (1, 8, "auto", (False, None, "4")),
        (2, 8, "auto", (True, None, "2")),
        (8, 3, "auto", (True, None, "1")),
    ],
)
def test_joblibs_processes_share_out_the_free_cores(
    n_jobs: int,
    jobs: int,
    asked: int | str,
    expected: tuple[bool, str | None, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LOKY_MAX_CPU_COUNT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "free_cores", lambda: 4)
    with shared_out_cores(n_jobs, {"accelerator": "cpu", "threads": asked}, jobs) as in_worker:
        assert (in_worker, os.environ.get("LOKY_MAX_CPU_COUNT"), os.environ.get("OMP_NUM_THREADS")) == expected
    assert not {"LOKY_MAX_CPU_COUNT", "OMP_NUM_THREADS"} & set(os.environ)


def test_a_number_of_threads_that_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(threads, "free_cores", lambda: 8)
    with shared_out_cores(-1, {"accelerator": "cpu"}, 4):
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ["LOKY_MAX_CPU_COUNT"] == "2"
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_the_threads_of_a_job_that_goes_on_leave_room_for_fewer_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "free_cores", lambda: 8)
    with shared_out_cores(-1, {"accelerator": "cpu", "threads": "auto"}, 8, kept=4):
        assert (os.environ["LOKY_MAX_CPU_COUNT"], os.environ["OMP_NUM_THREADS"]) == ("2", "4")
