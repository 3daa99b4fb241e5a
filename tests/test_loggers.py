"""Loggers, tested without an account and without a server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from running import arguments, rows, train
from sdtune.loggers import LoggerSettings


def test_wandb_offline_writes_one_folder_per_run(
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


def test_wandb_without_account_is_refused_and_creates_no_folder(
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


def test_tensorboard_has_every_step(tiny: Path, images: Path, tmp_path: Path) -> None:
    assert train(*arguments(tiny, images, tmp_path / "run", "trainer.max_steps=3", "logger=tensorboard")) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == [1, 2, 3]
    assert [event.value for event in logged] == pytest.approx([float(r["loss"]) for r in rows(tmp_path / "run")])
    assert {"grad_norm", "lr/denoiser", "samples_per_second"} <= set(events.Tags()["scalars"])


def make_csv_logger(save_dir: str) -> CSVLogger:
    return CSVLogger(save_dir, name="own")


class Unclosed(LoggerSettings):
    """Logger whose service is gone when the run ends."""

    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> CSVLogger:
        return CSVLogger(str(folder), name="unclosed")

    def close(self, logger: CSVLogger, failed: bool) -> None:
        raise ConnectionError(f"no service to tell {failed}")


def test_function_of_another_package_can_create_a_logger(tiny: Path, images: Path, tmp_path: Path) -> None:
    overrides = ["trust=[test_loggers]", "+logger.own._target_=test_loggers.make_csv_logger", "trainer.max_steps=2"]
    assert train(*arguments(tiny, images, tmp_path / "run", *overrides)) == 0
    assert len(list((tmp_path / "run" / "own").glob("*/metrics.csv"))) == 1


def test_logger_that_fails_to_close_hides_no_other_error_and_no_other_logger(
    tiny: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [
        "trust=[test_loggers,running]",
        "trainer.max_steps=3",
        "+callbacks.poison={_target_: running.Poison, step: 2}",
    ]
    overrides += ["+logger.own._target_=test_loggers.make_csv_logger", "+logger.gone._target_=test_loggers.Unclosed"]
    assert train(*arguments(tiny, images, tmp_path / "run", *overrides)) == 1
    output = capsys.readouterr()
    assert "sdtune: step 2: the loss or its gradient is not finite" in output.err
    assert "CSVLogger: ConnectionError: no service to tell True" in output.out + output.err
    [kept] = (tmp_path / "run" / "own").glob("*/metrics.csv")
    assert kept.read_text(encoding="utf-8").count("\n") > 1, "the other logger was closed and has written its file"


class Interrupted(LoggerSettings):
    """Logger whose artifact upload is interrupted by Ctrl-C."""

    def open(self, folder: Path, method: str, label: str, sweep: str | None) -> CSVLogger:
        return CSVLogger(str(folder), name="interrupted")

    def keep_artifact(self, logger: CSVLogger, artifact: Path, name: str) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_after_the_training_names_the_resume_command(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["trust=[test_loggers]", "+logger.own._target_=test_loggers.Interrupted", "trainer.max_steps=2"]
    assert train(*arguments(tiny, images, tmp_path / "run", *overrides)) == 130
    expected = f"sdtune: stopped; continue it with: sdtune train resume={tmp_path}/run"
    assert capsys.readouterr().err.splitlines()[-1] == expected
