"""W&B logging of runs and sweeps, read from W&B's offline files."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from running import arguments, rows, start, train
from sdtune import loggers
from sdtune.config.compose import compose, search_path
from wandb_files import records, told


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    return ["logger=wandb", "logger.wandb.offline=true", "logger.wandb.tags=[mine]"]


def assert_dashboard_uses_logged_names(job: dict[str, Any]) -> None:
    """Assert that ``job`` has logged every metric and setting that the dashboard's panels use."""
    file = Path(__file__).parents[2] / "docs" / "wandb_dashboard.py"
    view = runpy.run_path(str(file))["dashboard"](
        "us", "sdtune", "my sweep", "validation_loss", ["method.rank", "optimizer.lr"], ["optimizer.lr"]
    )
    spec = json.loads(view._to_model().model_dump_json(by_alias=True))["spec"]["section"]
    [runs] = spec["runSets"]
    assert runs["filters"]["filters"][0]["value"] == ["my sweep"] == [job["run"].run_group]
    assert runs["sort"]["keys"] == [
        {"key": {"section": "summary", "name": "final/validation_loss"}, "ascending": True}
    ], "the lowest loss first"
    panels = [panel["config"] for part in spec["panelBankConfig"]["sections"] for panel in part["panels"]]
    logged = {key for row in job["history"] for key in row}
    lines = [panel for panel in panels if "xExpression" in panel]
    assert len(lines) == 4
    for line in lines:
        assert line["xAxis"] in logged
        assert set(line["metrics"] or ()) <= logged
        assert line["metricRegex"] is None or any(re.fullmatch(line["metricRegex"], key) for key in logged)
    axes = [panel[axis] for panel in panels if "showLinearRegression" in panel for axis in ("xAxis", "yAxis")]
    axes += [column["accessor"] for panel in panels for column in panel.get("columns", ())]
    assert len(axes) == 15
    for axis in axes:
        source, _, key = axis.partition(":")
        if source == "summary":
            assert key in job["summary"]
        else:
            group, _, name = key.split(".")
            assert name in job["config"][group]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "shared_backbone"])
def test_runs_of_a_sweep_share_a_group_and_log_their_own_settings(
    launcher: str, offline: list[str], tiny: Path, images: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "my sweep"
    overrides = [
        a for a in arguments(tiny, images, tmp_path, *offline) if not a.startswith(("hydra.run", "method.rank"))
    ]
    overrides += [
        f"hydra.sweep.dir='{sweep}'",
        "trainer.max_steps=3",
        "data.hold_out=5",
        "trainer.val_check_interval=1",
    ]
    overrides = [a for a in overrides if a != "callbacks.samples=null"]
    overrides += ["callbacks.samples.sampling.steps=1", "callbacks.samples.every_steps=null"]
    overrides += [f"hydra/launcher={launcher}"]
    assert train("-m", *overrides, "method.rank=2,3", "optimizer.lr=1e-2,1e30") == 1
    logged = {job: told(sweep / job) for job in "0123"}
    assert len({run["run"].run_id for run in logged.values()}) == 4
    for job, rank, rate in (("0", 2, 1e-2), ("1", 2, 1e30), ("2", 3, 1e-2), ("3", 3, 1e30)):
        run = logged[job]
        assert run["run"].run_group == "my sweep"
        assert run["run"].job_type == "LoRA"
        assert list(run["run"].tags) == ["mine"]
        assert run["run"].display_name == f"method.rank={rank} optimizer.lr={rate:g}"
        assert run["config"]["method"]["rank"] == rank
        assert run["config"]["optimizer"]["lr"] == rate
        assert run["config"]["callbacks"]["samples"]["sampling"]["steps"] == 1
        assert run["exit"] == (0 if rate < 1 else 1)
    for job in "02":
        history = logged[job]["history"]
        losses = {row["trainer/global_step"]: row["loss"] for row in history if "loss" in row}
        expected = {int(r["step"]): float(r["loss"]) for r in rows(sweep / job) if r["loss"]}
        assert losses == pytest.approx(expected)
        measured = [float(r["validation_loss"]) for r in rows(sweep / job) if r["validation_loss"]]
        summary = logged[job]["summary"]
        minimum = summary["validation_loss"]["min"] if isinstance(summary["validation_loss"], dict) else None
        assert (minimum if minimum is not None else summary["validation_loss/min"]) == pytest.approx(min(measured))
        assert summary["final/steps"] == 3
        media = "wandb/offline-run-*/files/media"
        assert len(list((sweep / job).glob(f"{media}/images/samples_*.png"))) == 2
        [table] = (sweep / job).glob(f"{media}/table/before_after_*.json")
        content = json.loads(table.read_text(encoding="utf-8"))
        assert content["columns"] == ["prompt", "seed", "before", "after"]
        assert [row[:2] for row in content["data"]] == [[f"picture number {i}", 0] for i in range(4)]
        assert "run_table" in logged[job]["artifacts"], "the table contains the images"
    assert_dashboard_uses_logged_names(logged["0"])


def test_resumed_run_keeps_its_wandb_id(offline: list[str], tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*arguments(tiny, images, run, *offline, "trainer.max_steps=2")) == 0
    assert train(f"resume={run}", "trainer.max_steps=3") == 0
    ids = {
        record.run.run_id
        for file in run.glob("wandb/offline-run-*/run-*.wandb")
        for record in records(file)
        if record.WhichOneof("record_type") == "run"
    }
    assert len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 2
    assert len(ids) == 1


@pytest.mark.slow
def test_artifact_is_logged_only_if_enabled(offline: list[str], tiny: Path, images: Path, tmp_path: Path) -> None:
    for enabled in (False, True):
        run = tmp_path / str(enabled)
        overrides = [f"logger.wandb.log_artifact={str(enabled).lower()}", "trainer.max_steps=1", "name=my otter"]
        assert train(*arguments(tiny, images, run, *offline, *overrides)) == 0
        [file] = run.glob("wandb/offline-run-*/run-*.wandb")
        artifacts = [r for r in records(file) if r.WhichOneof("record_type") == "artifact"]
        assert bool(artifacts) is enabled


def test_command_line_of_a_wandb_agent_composes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a server: the agent's command line composes, and the agent determines the run's id."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load((Path(__file__).parents[2] / "docs" / "wandb-sweep.yaml").read_text(encoding="utf-8"))
    chosen = {"method.rank": {"value": 8}, "optimizer.lr": {"value": 0.0003}}
    assert chosen.keys() == sweep["parameters"].keys()
    filled = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    assert sweep["command"][:2] == ["sdtune", "train"]
    words = [word for part in sweep["command"][2:] for word in (filled if part == "${args_no_hyphens}" else [part])]
    config = compose("train", search_path(None), words)
    assert (config.method.rank, config.optimizer.lr) == (8, 0.0003)
    assert "wandb" in config.logger
    assert sweep["metric"]["name"] == "final/subject_gain"
    assert loggers.wandb_run_id(tmp_path) == loggers.wandb_run_id(tmp_path) is not None
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert loggers.wandb_run_id(tmp_path) is None


@pytest.mark.slow
def test_run_terminated_during_evaluation_is_finished_in_wandb(
    offline: list[str], tiny: Path, images: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    overrides = [a for a in arguments(tiny, images, run, *offline, "trainer.max_steps=1") if a != "evaluation=none"]
    slow_evaluation = ["evaluation.clip=pocket", "evaluation.images=200", "evaluation.sampling.steps=500"]
    process = start(log, *overrides, *slow_evaluation)
    deadline = time.monotonic() + 200
    while not list(run.glob("artifact/*.safetensors")):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, log.read_text(encoding="utf-8")
    assert told(run)["exit"] == 1
    assert f"sdtune: stopped; continue it with: sdtune train resume={run}" in log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_disabled_wandb_writes_no_files(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run, log = tmp_path / "run", tmp_path / "log"
    overrides = [a for a in arguments(tiny, images, run, "logger=wandb") if a != "callbacks.samples=null"]
    overrides += ["callbacks.samples.sampling.steps=1", "trainer.max_steps=1", "logger.wandb.log_artifact=true"]
    # In a separate process, because W&B reads its environment once per process.
    assert start(log, *overrides).wait(timeout=200) == 0, log.read_text(encoding="utf-8")
    assert not list(run.glob("wandb/*run-*"))


def test_concurrent_calls_return_the_same_run_id(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: loggers.wandb_run_id(tmp_path), range(64)))
    assert len(ids) == 1
    assert [file.name for file in (tmp_path / "wandb").iterdir()] == ["id"]
