"""What W&B is told of a sweep, read back from its offline files."""

from __future__ import annotations

import json
import re
import runpy
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.proto import wandb_internal_pb2

from running import arguments, rows, train
from sdtune import loggers
from sdtune.launch import _compose, _search_path

_BLOCK, _HEADER = 2**15, struct.Struct("<IHB")
_FULL, _LAST = 1, 4


def records(file: Path) -> list[Any]:
    """Of a run that is over; W&B's own process writes the end of its file, a moment after the run's."""
    until = time.monotonic() + 20
    while not (found := parsed(file)) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < until, "no end in 20 s"
        time.sleep(0.1)
    return found


def parsed(file: Path) -> list[Any]:
    """Of a ``.wandb`` file: protobuf messages in LevelDB's log format, behind a header of its own."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    found, whole, at = [], b"", 7
    while at + _HEADER.size <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER.size:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        if at + length > len(content):
            break  # it is still being written
        whole += content[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def told(run: Path) -> dict[str, Any]:
    """Of one job: the run's facts, config, history and summary."""
    [file] = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "artifacts": []}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "config":
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.config.update}
        elif kind == "history":
            keys = ["/".join(item.nested_key) or item.key for item in record.history.item]
            values = [json.loads(item.value_json) for item in record.history.item]
            found["history"].append(dict(zip(keys, values, strict=True)))
        elif kind == "summary":
            for update in record.summary.update:
                found["summary"]["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
        elif kind == "artifact":
            found["artifacts"].append(record.artifact.type)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    return ["logger=wandb", "logger.wandb.offline=true", "logger.wandb.tags=[mine]"]


def assert_the_dashboard_finds_it(job: dict[str, Any]) -> None:
    """Every name in the dashboard's panels is one that ``job`` has told W&B."""
    file = Path(__file__).parents[1] / "docs" / "wandb_dashboard.py"
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
        place, _, key = axis.partition(":")
        if place == "summary":
            assert key in job["summary"]
        else:
            group, _, name = key.split(".")
            assert name in job["config"][group]


def test_a_sweeps_runs_share_a_group_and_keep_their_own_settings(
    offline: list[str], tiny: Path, pictures: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "my sweep"
    own = [a for a in arguments(tiny, pictures, tmp_path, *offline) if not a.startswith(("hydra.run", "method.rank"))]
    own += [f"hydra.sweep.dir='{sweep}'", "trainer.max_steps=3", "data.hold_out=5", "trainer.val_check_interval=1"]
    own = [a for a in own if a != "callbacks.samples=null"]
    own += ["callbacks.samples.sampling.steps=1", "callbacks.samples.seeds=[0]"]
    assert train("-m", *own, "method.rank=2,3", "optimizer.lr=1e-2,1e30") == 1
    found = {job: told(sweep / job) for job in "0123"}
    assert len({one["run"].run_id for one in found.values()}) == 4
    for job, rank, rate in (("0", 2, 1e-2), ("1", 2, 1e30), ("2", 3, 1e-2), ("3", 3, 1e30)):
        one = found[job]
        assert one["run"].run_group == "my sweep"
        assert one["run"].job_type == "LoRA"
        assert list(one["run"].tags) == ["mine"]
        assert one["run"].display_name == f"method.rank={rank} optimizer.lr={rate:g}"
        assert one["config"]["method"]["rank"] == rank
        assert one["config"]["optimizer"]["lr"] == rate
        assert one["config"]["callbacks"]["samples"]["sampling"]["steps"] == 1
        assert one["exit"] == (0 if rate < 1 else 1)
    for job in "02":
        history = found[job]["history"]
        losses = {row["trainer/global_step"]: row["loss"] for row in history if "loss" in row}
        wanted = {int(r["step"]): float(r["loss"]) for r in rows(sweep / job) if r["loss"]}
        assert losses == pytest.approx(wanted)
        measured = [float(r["validation_loss"]) for r in rows(sweep / job) if r["validation_loss"]]
        summary = found[job]["summary"]
        least = summary["validation_loss"]["min"] if isinstance(summary["validation_loss"], dict) else None
        assert (least if least is not None else summary["validation_loss/min"]) == pytest.approx(min(measured))
        assert summary["final/steps"] == 3
        media = "wandb/offline-run-*/files/media"
        assert len(list((sweep / job).glob(f"{media}/images/samples_*.png"))) == 2
        [table] = (sweep / job).glob(f"{media}/table/before_after_*.json")
        shown = json.loads(table.read_text())
        assert shown["columns"] == ["prompt", "seed", "before", "after"]
        assert [row[:2] for row in shown["data"]] == [[f"picture number {i}", 0] for i in range(4)]
        assert "run_table" in found[job]["artifacts"], "it has the pictures"
    assert_the_dashboard_finds_it(found["0"])


def test_a_resumed_run_keeps_its_id(offline: list[str], tiny: Path, pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*arguments(tiny, pictures, run, *offline, "trainer.max_steps=2")) == 0
    assert train(f"resume={run}", "trainer.max_steps=3") == 0
    ids = {
        record.run.run_id
        for file in run.glob("wandb/offline-run-*/run-*.wandb")
        for record in records(file)
        if record.WhichOneof("record_type") == "run"
    }
    assert len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 2
    assert len(ids) == 1


def test_an_artifact_is_versioned_on_request(offline: list[str], tiny: Path, pictures: Path, tmp_path: Path) -> None:
    for on in (False, True):
        run = tmp_path / str(on)
        own = [f"logger.wandb.log_artifact={str(on).lower()}", "trainer.max_steps=1", "name=my otter"]
        assert train(*arguments(tiny, pictures, run, *offline, *own)) == 0
        [file] = run.glob("wandb/offline-run-*/run-*.wandb")
        kept = [r for r in records(file) if r.WhichOneof("record_type") == "artifact"]
        assert bool(kept) is on


def test_wandbs_own_agent_hands_over_overrides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As far as it goes without a server: its command line composes, and the run's id stays the agent's."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load((Path(__file__).parents[1] / "docs" / "wandb-sweep.yaml").read_text())
    chosen = {"method.rank": {"value": 8}, "optimizer.lr": {"value": 0.0003}}
    assert chosen.keys() == sweep["parameters"].keys()
    filled = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    assert sweep["command"][:2] == ["sdtune", "train"]
    words = [w for part in sweep["command"][2:] for w in (filled if part == "${args_no_hyphens}" else [part])]
    config = _compose("train", _search_path(None), words)
    assert (config.method.rank, config.optimizer.lr) == (8, 0.0003)
    assert "wandb" in config.logger
    assert sweep["metric"]["name"] == "final/subject_gain"
    assert loggers._run_id(tmp_path) == loggers._run_id(tmp_path) is not None
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert loggers._run_id(tmp_path) is None
