"""Shared-backbone launcher: grouping of jobs, job folders, stopping."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from running import EPS, rows, start, train, wait_for_step
from sdtune.backbone.families import SD1
from sdtune.methods import LoRA
from sdtune.sampling import run_models
from sdtune.shared_backbone import pool
from sdtune.shared_backbone.compatibility import difference, groups, largest_config, largest_rank
from sdtune.sweeps import shared_group

LAUNCHER = ("hydra/launcher=shared_backbone", "hydra.launcher.processes=1")


def files(run: Path) -> set[str]:
    return {
        str(file.relative_to(run)) for file in run.rglob("*") if file.is_file() and not file.name.startswith("run-")
    }


def test_shared_job_writes_the_same_files_as_a_separate_job(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[None] = []
    monkeypatch.setattr(pool, "release", lambda: released.append(None))
    overrides = [*settings, "callbacks.samples.sampling.steps=2", "optimizer.lr=1e-3,1e-4,1e-5"]
    overrides += ["trainer.max_steps=1"]
    assert (
        train(*overrides, *LAUNCHER, "hydra.launcher.max_concurrent_runs=2", f"hydra.sweep.dir={tmp_path}/together")
        == 0
    )
    assert "jobs 0-2 share one backbone, 2 at a time" in capsys.readouterr().out
    assert len(released) == 1  # once for all runs, although each has generated previews
    assert train(*overrides, f"hydra.sweep.dir={tmp_path}/alone") == 0
    for job in "012":
        together, alone = tmp_path / "together" / job, tmp_path / "alone" / job
        assert files(together) == files(alone)
        for name in (".hydra/config.yaml", ".hydra/overrides.yaml", "job.json", "samples/step00000000.png"):
            assert (together / name).read_bytes() == (alone / name).read_bytes(), name
        hydra_config = yaml.safe_load((together / ".hydra/hydra.yaml").read_text(encoding="utf-8"))["hydra"]
        assert hydra_config["runtime"]["output_dir"] == str(together)
        metrics, metrics_alone = (
            json.loads((run / "metrics.json").read_text(encoding="utf-8")) for run in (together, alone)
        )
        assert metrics.pop("shared_with") == 2
        assert metrics.keys() == metrics_alone.keys()
        assert f"metrics: {together}" in (together / "train.log").read_text(encoding="utf-8")
        assert (together / "train.log").read_text(encoding="utf-8").count("metrics:") == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "textual_inversion"])
def test_finished_runs_are_evaluated_together(
    method: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [a for a in settings if not a.startswith("evaluation")]
    overrides += ["callbacks.samples=null", "evaluation=clip", "evaluation.clip=pocket", "evaluation.images=2", EPS]
    overrides += ["evaluation.sampling.steps=2"]
    if method == "textual_inversion":
        overrides = [a for a in overrides if not a.startswith("method")]
        overrides += ["method=textual_inversion", 'new_tokens=[{token: "<x>", init: a}]', "data.templates=['{} <x>']"]
    # In bfloat16, merged weights and separate pairs have different rounding errors.
    monkeypatch.setattr(run_models, "precision", lambda *_: "32-true")
    batch_sizes: list[int] = []
    forward = pool.Pool.compute

    def spy(self: pool.Pool, calls: dict[int, pool.Forward], idle: set[int]) -> None:
        if next(iter(calls.values())).pairs is not None:
            batch_sizes.append(len(calls))
        forward(self, calls, idle)

    monkeypatch.setattr(pool.Pool, "compute", spy)
    assert train(*overrides, *LAUNCHER, "optimizer.lr=1e-2,1e-3,1e-4", f"hydra.sweep.dir={tmp_path}/together") == 0
    assert batch_sizes
    assert set(batch_sizes) == {3}
    assert train(*overrides, "optimizer.lr=1e-2,1e-3,1e-4", f"hydra.sweep.dir={tmp_path}/alone") == 0
    for job in "012":
        metrics, metrics_alone = (
            json.loads((tmp_path / folder / job / "metrics.json").read_text(encoding="utf-8"))
            for folder in ("together", "alone")
        )
        for name in ("clip_image", "clip_text", "diversity"):
            assert metrics[name] == pytest.approx(metrics_alone[name], abs=1e-4), name


@pytest.mark.slow
def test_job_that_cannot_share_runs_alone_and_is_reported(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [a for a in settings if not a.startswith(("method=", "method.rank", "data.batch_size"))]
    assert (
        train(
            *overrides, "callbacks.samples=null", *LAUNCHER, "method=lora,full", "data.batch_size=1,2", "seed=0,1",
            f"hydra.sweep.dir={tmp_path}/sweep",
        )
        == 0
    )  # fmt: skip
    output = capsys.readouterr().out
    assert "jobs 0-2 share one backbone, 2 at a time" in output
    assert "jobs 2-3 share one backbone\n" in output
    assert output.count("runs alone: method: Full trains the backbone or an additional network") == 4
    assert "sweep: 8 of 8 jobs are done" in output


@pytest.mark.slow
def test_jobs_are_divided_between_two_devices(settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, "callbacks.samples=null", "data.batch_size=1", "optimizer.lr=1e-3,1e-4,1e-5"]
    two, one, log = tmp_path / "two", tmp_path / "one", tmp_path / "log"
    process = start(
        log,
        *overrides,
        *LAUNCHER,
        "hydra.launcher.max_concurrent_runs=2",
        "hardware.devices=2",
        f"hydra.sweep.dir={two}",
    )
    assert process.wait(240) == 0, log.read_text(encoding="utf-8")
    assert "jobs 0-2 share one backbone on each of 2 devices" in log.read_text(encoding="utf-8")
    assert train(*overrides, *LAUNCHER, "hydra.launcher.max_concurrent_runs=2", f"hydra.sweep.dir={one}") == 0
    for job, count in zip("012", (2, 1, 2), strict=True):
        assert json.loads((two / job / "metrics.json").read_text(encoding="utf-8"))["shared_with"] == count
        assert files(two / job) == files(one / job)
        losses, losses_on_one = ([float(row["loss"]) for row in rows(folder / job)] for folder in (two, one))
        assert losses == pytest.approx(losses_on_one, rel=1e-5)


@pytest.mark.slow
def test_stop_on_two_devices_saves_every_job(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [a for a in settings if not a.startswith("trainer.max_steps")]
    overrides += ["callbacks.samples=null", *LAUNCHER, "hydra.launcher.max_concurrent_runs=2", "data.batch_size=2"]
    process = start(
        log,
        *overrides,
        "optimizer.lr=1e-3,1e-4",
        "hardware.devices=2",
        "trainer.max_steps=4000",
        f"hydra.sweep.dir={sweep}",
    )
    wait_for_step(process, sweep / "1", 3, log)
    wait_for_step(process, sweep / "0", 3, log)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert f"sdtune: the sweep is stopped; continue it with: sdtune train -m resume={sweep}" in log.read_text(
        encoding="utf-8"
    )
    assert all((sweep / job / "artifact" / "mine.safetensors").is_file() for job in "01")


@pytest.mark.slow
def test_stop_saves_every_job_at_the_same_step(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [a for a in settings if not a.startswith("trainer.max_steps")]
    overrides += ["callbacks.samples=null", *LAUNCHER, "optimizer.lr=1e-3,1e-4", f"hydra.sweep.dir={sweep}"]
    process = start(log, *overrides, "trainer.max_steps=4000")
    wait_for_step(process, sweep / "1", 3, log)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert f"sdtune: the sweep is stopped; continue it with: sdtune train -m resume={sweep}" in log.read_text(
        encoding="utf-8"
    )
    last = [max((sweep / job / "checkpoints").glob("step*.ckpt")).stem for job in "01"]
    assert last[0] == last[1]
    assert all((sweep / job / "artifact" / "mine.safetensors").is_file() for job in "01")
    assert rows(sweep / "0")[-1]["step"] == str(int(last[0].removeprefix("step")))


@pytest.mark.slow
def test_exported_pipeline_contains_the_lora_of_its_job(settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, "callbacks.samples=null", "exports=[{format: pipeline}]", "optimizer.lr=1e-1,1e-2"]
    for way in (LAUNCHER, ()):
        assert train(*overrides, *way, f"hydra.sweep.dir={tmp_path}/{len(way)}") == 0
    for job in "01":
        weights, weights_alone = (
            load_file(next((tmp_path / way / job / "export").rglob("unet/*.safetensors"))) for way in "10"
        )
        name = next(name for name in weights_alone if name.endswith("attn2.to_q.weight"))
        assert (weights[name] - weights_alone[name]).abs().max() < 1e-3  # the export is in half precision
    assert (weights[name] - load_file(next((tmp_path / "1" / "0" / "export").rglob("unet/*.safetensors")))[name]).any()


@pytest.mark.parametrize("value", ["0", "2.5", "all"])
def test_invalid_max_concurrent_runs_is_refused(
    value: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*settings, *LAUNCHER, "optimizer.lr=1e-3,1e-4", f"hydra.launcher.max_concurrent_runs={value}"]
    assert train(*overrides, f"hydra.sweep.dir={tmp_path}/sweep") == 2
    assert "hydra.launcher.max_concurrent_runs: " in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("value", ["0", "[]"])
def test_invalid_devices_are_refused(
    value: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*settings, *LAUNCHER, "optimizer.lr=1e-3,1e-4", f"hardware.devices={value}"]
    assert train(*overrides, f"hydra.sweep.dir={tmp_path}/sweep") == 2
    assert "hardware.devices: " in capsys.readouterr().err


def test_devices_setting_selects_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    node: dict[str, object] = {"accelerator": "gpu"}
    for devices, indices in ((1, [0]), ([1], [1]), ("2,3", [2, 3]), ("auto", [0, 1, 2, 3]), (2, [0, 1])):
        selected = shared_group.devices_of({**node, "devices": devices})
        assert selected == [torch.device("cuda", index) for index in indices]
    assert shared_group.devices_of({"accelerator": "cpu", "devices": 2}) == [torch.device("cpu")] * 2


@pytest.mark.slow
def test_stop_before_the_first_step_ends_all_jobs_without_artifacts(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [
        *settings,
        "callbacks.samples.sampling.steps=900",
        "callbacks.samples.sampling.sampler=ddim",
        *LAUNCHER,
    ]
    process = start(log, *overrides, "optimizer.lr=1e-3,1e-4", f"hydra.sweep.dir={sweep}")
    while "trainable: " not in log.read_text(encoding="utf-8") and process.poll() is None:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert not list(sweep.glob("*/artifact"))
    assert [json.loads(file.read_text(encoding="utf-8"))["state"] for file in sweep.glob("*/job.json")] == [
        "unfinished"
    ] * 2


@pytest.mark.slow
def test_stop_while_jobs_generate_images_saves_every_job(settings: list[str], tmp_path: Path) -> None:
    """Both jobs generate previews every two steps."""
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    overrides = [a for a in settings if not a.startswith("trainer.max_steps")]
    overrides += ["callbacks.samples.sampling.steps=100", "callbacks.samples.every_steps=2", *LAUNCHER]
    process = start(log, *overrides, "optimizer.lr=1e-3,1e-4", "trainer.max_steps=4000", f"hydra.sweep.dir={sweep}")
    wait_for_step(process, sweep / "1", 3, log)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    for job in "01":
        last = max((sweep / job / "checkpoints").glob("step*.ckpt")).stem
        assert rows(sweep / job)[-1]["step"] == str(int(last.removeprefix("step")))
        assert (sweep / job / "artifact" / "mine.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 4])
def test_validation_that_a_stop_aborts_is_repeated(settings: list[str], tmp_path: Path, stop: int) -> None:
    overrides = [a for a in settings if not a.startswith("trainer.max_steps")]
    overrides += ["trainer.max_steps=4", "trainer.val_check_interval=2", "data.hold_out=5", *LAUNCHER]
    overrides += ["optimizer.lr=1e-3,1e-4", "callbacks.samples=null"]
    assert train(*overrides, f"hydra.sweep.dir={tmp_path}/whole") == 0
    callback = f"+callbacks.stop={{_target_: running.StopInValidation, step: {stop}, file: {tmp_path}/batches.txt}}"
    stopped = tmp_path / "stopped"
    assert train(*overrides, "trust=[running]", callback, f"hydra.sweep.dir={stopped}") == 128 + signal.SIGTERM
    assert train("-m", f"resume={stopped}") == 0
    for job in "01":
        whole = tmp_path / "whole" / job
        assert (stopped / job / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
        one, other = (load_file(run / "artifact" / "mine.safetensors") for run in (stopped / job, whole))
        assert all(torch.equal(one[key], other[key]) for key in one | other)


BASE = {
    "method": {"_target_": "sdtune.methods.LoRA", "rank": 4},
    "backbone": {"_target_": "sdtune.backbone.Pretrained", "path": "pocket"},
    "hardware": {"devices": 1, "strategy": "auto"},
    "data": {"batch_size": 2, "resolution": None, "class_prompt": None},
    "trainer": {"max_steps": 3},
    "seed": 0,
}


class Wider(LoRA):
    """User-defined method."""

    denoiser_is_read_only = False


def with_changes(group: str, **settings: object) -> dict[str, object]:
    return {**BASE, group: {**BASE[group], **settings}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (with_changes("method", rank=8), None),
        (with_changes("data", path="elsewhere", flip=True), None),
        ({**BASE, "seed": 1}, None),
        (with_changes("data", batch_size=4), "data.batch_size"),
        (with_changes("data", class_prompt="a dog"), "data.class_prompt"),
        (with_changes("trainer", max_steps=4), "trainer.max_steps"),
        (with_changes("trainer", gradient_clip_val=0.5), None),
        (with_changes("backbone", path="other"), "backbone.path"),
    ],
)
def test_only_jobs_with_equal_backbone_and_batch_settings_share(other: dict[str, object], key: str | None) -> None:
    assert difference(BASE, other) == key
    assert len(groups([BASE, other])) == (1 if key is None else 2)


def test_memory_of_a_group_counts_layers_and_ranks_of_a_file(tmp_path: Path) -> None:
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    pair = {f"{key}.lora_down.weight": torch.zeros(24, 32), f"{key}.lora_up.weight": torch.zeros(32, 24)}
    save_file(pair, tmp_path / "it.safetensors")
    named = {**BASE, "callbacks": {}, "method": {"rank": 4, "targets": ["cross_attention"], "projections": ["q"]}}
    default = {**named, "method": {"rank": None, "targets": None, "projections": None}}
    of_file = {**named, "method": {**default["method"], "weights": str(tmp_path / "it.safetensors")}}  # type: ignore[dict-item]
    assert [largest_rank(config["method"]) for config in (named, default, of_file)] == [4, 8, 24]  # type: ignore[arg-type]
    assert largest_rank({"_target_": "sdtune.methods.TextualInversion"}) == 0
    method = largest_config([named, default], {}, SD1)["method"]
    assert (method["rank"], method["targets"]) == (8, ["cross_attention", "self_attention"])
    assert method["projections"] == ["k", "out", "q", "v"]
    method = largest_config([named, of_file], {}, SD1)["method"]
    assert (method["rank"], method["weights"], len(method["targets"])) == (24, None, 5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (with_changes("hardware", offload=True), "hardware.offload"),
        (with_changes("hardware", num_nodes=2), "hardware.num_nodes"),
        (with_changes("method", _target_="sdtune.methods.ControlNet"), "method: ControlNet"),
        (with_changes("backbone", from_scratch=["denoiser"]), "backbone.from_scratch"),
        (with_changes("trainer", detect_anomaly=True), "trainer.detect_anomaly"),
        (
            {**with_changes("method", _target_=f"{__name__}.Wider"), "trust": [__name__]},
            "method: Wider may train more than",
        ),
    ],
)
def test_job_that_cannot_share_has_a_reason(config: dict[str, object], reason: str) -> None:
    [first, second] = groups([config, config])
    assert first.alone is not None
    assert first.alone.startswith(reason)
    assert second.jobs == [1]
