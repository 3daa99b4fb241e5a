"""Identification of launchers and sweepers by class; division of cores among joblib workers."""

from __future__ import annotations

import os

import pytest
from omegaconf import OmegaConf

from sdtune.errors import UserError
from sdtune.hardware import threads
from sdtune.sweeps.launchers import divided_cores, is_joblib, is_slurm, plugin
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
def test_plugin_is_identified_by_its_class(name: str) -> None:
    kind = plugin(OmegaConf.create({"_target_": TARGETS[name]}))
    assert is_joblib(kind) is (name == "joblib")
    assert is_slurm(kind) is (name == "slurm")
    assert issubclass(kind, SharedBackboneLauncher) is (name == "shared")
    assert issubclass(kind, OptunaSweeper) is (name == "optuna")


def test_missing_plugin_class_is_named_in_the_error() -> None:
    with pytest.raises(UserError, match="hydra: hydra_plugins.none.Launcher cannot be imported"):
        plugin(OmegaConf.create({"_target_": "hydra_plugins.none.Launcher"}))


@pytest.mark.parametrize(
    ("n_jobs", "jobs", "threads_setting", "expected"),
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
def test_joblib_processes_divide_the_free_cores(
    n_jobs: int,
    jobs: int,
    threads_setting: int | str,
    expected: tuple[bool, str | None, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LOKY_MAX_CPU_COUNT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "free_cores", lambda: 4)
    with divided_cores(n_jobs, {"accelerator": "cpu", "threads": threads_setting}, jobs) as in_worker:
        assert (in_worker, os.environ.get("LOKY_MAX_CPU_COUNT"), os.environ.get("OMP_NUM_THREADS")) == expected
    assert not {"LOKY_MAX_CPU_COUNT", "OMP_NUM_THREADS"} & set(os.environ)


def test_threads_of_the_environment_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(threads, "free_cores", lambda: 8)
    with divided_cores(-1, {"accelerator": "cpu"}, 4):
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ["LOKY_MAX_CPU_COUNT"] == "2"
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_threads_of_resumed_jobs_limit_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "free_cores", lambda: 8)
    with divided_cores(-1, {"accelerator": "cpu", "threads": "auto"}, 8, kept=4):
        assert (os.environ["LOKY_MAX_CPU_COUNT"], os.environ["OMP_NUM_THREADS"]) == ("2", "4")
