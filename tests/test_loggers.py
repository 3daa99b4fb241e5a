"""Loggers, without an account and without a server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from running import arguments, rows, train
from sdtune.loggers import LoggerSettings


def test_wandb_offline_keeps_jobs_apart(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    for number in range(2):
        run = tmp_path / f"run{number}"
        settings = ["trainer.max_steps=2", "logger=wandb", "logger.wandb.offline=true"]
        assert train(*arguments(tiny, images, run, *settings)) == 0
        assert len(list((run / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
        assert len(rows(run)) == 2
        assert "WANDB_MODE" not in os.environ


def test_wandb_without_an_account_is_refused_and_leaves_no_folder(
    tiny: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert train(*arguments(tiny, images, tmp_path / "run", "trainer.max_steps=2", "logger=wandb")) == 2
    assert "logger.wandb: no account" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_every_step(tiny: Path, images: Path, tmp_path: Path) -> None:
    assert train(*arguments(tiny, images, tmp_path / "run", "trainer.max_steps=3", "logger=tensorboard")) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == [1, 2, 3]
    assert [event.value for event in logged] == pytest.approx([float(r["loss"]) for r in rows(tmp_path / "run")])
    assert {"grad_norm", "lr/unet", "samples_per_second"} <= set(events.Tags()["scalars"])


def made_by_a_function(save_dir: str) -> CSVLogger:
    return CSVLogger(save_dir, name="own")


class Unclosed(LoggerSettings):
    """Its service is gone by the time that the run ends."""

    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> CSVLogger:
        return CSVLogger(str(folder), name="unclosed")

    def close(self, logger: CSVLogger, failed: bool) -> None:
        raise ConnectionError(f"no service to tell {failed}")


def test_a_function_of_another_package_may_make_a_logger(tiny: Path, images: Path, tmp_path: Path) -> None:
    own = ["trust=[test_loggers]", "+logger.own._target_=test_loggers.made_by_a_function", "trainer.max_steps=2"]
    assert train(*arguments(tiny, images, tmp_path / "run", *own)) == 0
    assert len(list((tmp_path / "run" / "own").glob("*/metrics.csv"))) == 1


def test_a_logger_that_cannot_be_closed_hides_neither_the_error_of_the_run_nor_the_other_loggers(
    tiny: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = [
        "trust=[test_loggers,running]",
        "trainer.max_steps=3",
        "+callbacks.poison={_target_: running.Poison, step: 2}",
    ]
    own += ["+logger.own._target_=test_loggers.made_by_a_function", "+logger.gone._target_=test_loggers.Unclosed"]
    assert train(*arguments(tiny, images, tmp_path / "run", *own)) == 1
    said = capsys.readouterr()
    assert "sdtune: step 2: the loss or its gradient is not finite" in said.err
    assert "CSVLogger: ConnectionError: no service to tell True" in said.out + said.err
    [kept] = (tmp_path / "run" / "own").glob("*/metrics.csv")
    assert kept.read_text().count("\n") > 1, "closed, and so written"


class Interrupted(LoggerSettings):
    """The user presses Ctrl-C while it uploads the artifact."""

    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> CSVLogger:
        return CSVLogger(str(folder), name="interrupted")

    def keep_artifact(self, logger: CSVLogger, artifact: Path, name: str) -> None:
        raise KeyboardInterrupt


def test_after_the_training_ctrl_c_names_the_command_that_goes_on(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["trust=[test_loggers]", "+logger.own._target_=test_loggers.Interrupted", "trainer.max_steps=2"]
    assert train(*arguments(tiny, images, tmp_path / "run", *own)) == 130
    expected = f"sdtune: stopped; sdtune train resume={tmp_path}/run goes on from its last checkpoint"
    assert capsys.readouterr().err.splitlines()[-1] == expected
