"""The launcher: which jobs go together, the folders that they leave, a stop, and what remains afterwards."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from running import EPS, rows, start, train, wait_for_step
from sdtune.evaluation import draw as drawing
from sdtune.methods import LoRA
from sdtune.shared_backbone import pool
from sdtune.shared_backbone.compatibility import difference, groups
from sdtune.sweeps import shared_group

LAUNCHER = ("hydra/launcher=shared_backbone", "hydra.launcher.processes=1")


def files(run: Path) -> set[str]:
    return {
        str(file.relative_to(run)) for file in run.rglob("*") if file.is_file() and not file.name.startswith("run-")
    }


def test_a_job_leaves_the_folder_that_it_would_have_left_alone(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[None] = []
    monkeypatch.setattr(pool, "release", lambda: released.append(None))
    own = [*settings, "callbacks.samples.sampling.steps=2", "optimizer.lr=1e-3,1e-4,1e-5"]
    assert train(*own, *LAUNCHER, "hydra.launcher.max_concurrent_runs=2", f"hydra.sweep.dir={tmp_path}/together") == 0
    assert "jobs 0-2 share one backbone, 2 at once" in capsys.readouterr().out
    assert len(released) == 1  # for all, though each has drawn before
    assert train(*own, f"hydra.sweep.dir={tmp_path}/alone") == 0
    for job in "012":
        together, alone = tmp_path / "together" / job, tmp_path / "alone" / job
        assert files(together) == files(alone)
        for name in (".hydra/config.yaml", ".hydra/overrides.yaml", "job.json", "samples/step00000000.png"):
            assert (together / name).read_bytes() == (alone / name).read_bytes(), name
        kept = yaml.safe_load((together / ".hydra/hydra.yaml").read_text())["hydra"]
        assert kept["runtime"]["output_dir"] == str(together)
        ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (together, alone))
        assert ours.pop("shared_with") == 2
        assert ours.keys() == theirs.keys()
        assert f"metrics: {together}" in (together / "train.log").read_text()
        assert (together / "train.log").read_text().count("metrics:") == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "words"])
def test_finished_runs_are_evaluated_together(
    method: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [a for a in settings if not a.startswith("evaluation")]
    own += ["callbacks.samples=null", "evaluation=clip", "evaluation.clip=pocket", "evaluation.images=2", EPS]
    own += ["evaluation.sampling.steps=2"]
    if method == "words":
        own = [a for a in own if not a.startswith("method")]
        own += ["method=textual_inversion", 'new_tokens=[{token: "<x>", init: a}]', "data.templates=['{} <x>']"]
    # In bfloat16, where a device has it, merged weights and pairs beside them are rounded apart.
    monkeypatch.setattr(drawing, "precision", lambda *_: "32-true")
    drawn: list[int] = []
    forward = pool.Pool.compute

    def spy(self: pool.Pool, calls: dict[int, pool.Forward], idle: set[int]) -> None:
        if next(iter(calls.values())).pairs is not None:
            drawn.append(len(calls))
        forward(self, calls, idle)

    monkeypatch.setattr(pool.Pool, "compute", spy)
    assert train(*own, *LAUNCHER, "optimizer.lr=1e-2,1e-3,1e-4", f"hydra.sweep.dir={tmp_path}/together") == 0
    assert drawn
    assert set(drawn) == {3}
    assert train(*own, "optimizer.lr=1e-2,1e-3,1e-4", f"hydra.sweep.dir={tmp_path}/alone") == 0
    for job in "012":
        ours, theirs = (
            json.loads((tmp_path / way / job / "metrics.json").read_text()) for way in ("together", "alone")
        )
        for name in ("clip_image", "clip_text", "diversity"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name


@pytest.mark.slow
def test_what_cannot_share_runs_by_itself_and_is_named(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [a for a in settings if not a.startswith(("method=", "method.rank", "data.batch_size"))]
    assert (
        train(
            *own, "callbacks.samples=null", *LAUNCHER, "method=lora,full", "data.batch_size=1,2", "seed=0,1",
            f"hydra.sweep.dir={tmp_path}/sweep",
        )
        == 0
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "jobs 0-1 share one backbone\n" in said
    assert "jobs 2-3 share one backbone\n" in said
    assert said.count("by itself: method: Full trains the backbone itself, or a net beside it") == 4
    assert "sweep: 8 of 8 jobs are done" in said


@pytest.mark.slow
def test_on_two_devices_the_jobs_are_shared_out(settings: list[str], tmp_path: Path) -> None:
    own = [*settings, "callbacks.samples=null", "data.batch_size=1", "optimizer.lr=1e-3,1e-4,1e-5"]
    two, one, log = tmp_path / "two", tmp_path / "one", tmp_path / "log"
    process = start(
        log, *own, *LAUNCHER, "hydra.launcher.max_concurrent_runs=2", "hardware.devices=2", f"hydra.sweep.dir={two}"
    )
    assert process.wait(240) == 0, log.read_text()
    assert "jobs 0-2 share one backbone on each of 2 devices" in log.read_text()
    assert train(*own, *LAUNCHER, "hydra.launcher.max_concurrent_runs=2", f"hydra.sweep.dir={one}") == 0
    for job, count in zip("012", (2, 1, 2), strict=True):
        assert json.loads((two / job / "metrics.json").read_text())["shared_with"] == count
        assert files(two / job) == files(one / job)
        ours, theirs = ([float(row["loss"]) for row in rows(place / job)] for place in (two, one))
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_stopped_on_two_devices_every_job_saves(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = [a for a in settings if not a.startswith("trainer.max_steps")]
    own += ["callbacks.samples=null", *LAUNCHER, "hydra.launcher.max_concurrent_runs=2", "data.batch_size=2"]
    process = start(
        log, *own, "optimizer.lr=1e-3,1e-4", "hardware.devices=2", "trainer.max_steps=4000", f"hydra.sweep.dir={sweep}"
    )
    wait_for_step(process, sweep / "1", 3, log)
    wait_for_step(process, sweep / "0", 3, log)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert f"sdtune: the sweep is stopped; sdtune train -m resume={sweep} goes on with it" in log.read_text()
    assert all((sweep / job / "artifact" / "mine.safetensors").is_file() for job in "01")


@pytest.mark.slow
def test_stopped_every_job_saves_and_the_sweep_goes_on(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = [a for a in settings if not a.startswith("trainer.max_steps")]
    own += ["callbacks.samples=null", *LAUNCHER, "optimizer.lr=1e-3,1e-4", f"hydra.sweep.dir={sweep}"]
    process = start(log, *own, "trainer.max_steps=4000")
    wait_for_step(process, sweep / "1", 3, log)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert f"sdtune: the sweep is stopped; sdtune train -m resume={sweep} goes on with it" in log.read_text()
    last = [max((sweep / job / "checkpoints").glob("step*.ckpt")).stem for job in "01"]
    assert last[0] == last[1]
    assert all((sweep / job / "artifact" / "mine.safetensors").is_file() for job in "01")
    assert rows(sweep / "0")[-1]["step"] == str(int(last[0].removeprefix("step")))


@pytest.mark.slow
def test_a_whole_model_that_a_job_exports_has_its_lora_in_it(settings: list[str], tmp_path: Path) -> None:
    own = [*settings, "callbacks.samples=null", "exports=[{format: pipeline}]", "optimizer.lr=1e-1,1e-2"]
    for way in (LAUNCHER, ()):
        assert train(*own, *way, f"hydra.sweep.dir={tmp_path}/{len(way)}") == 0
    for job in "01":
        ours, theirs = (load_file(next((tmp_path / way / job / "export").rglob("unet/*.safetensors"))) for way in "10")
        name = next(name for name in theirs if name.endswith("attn2.to_q.weight"))
        assert (ours[name] - theirs[name]).abs().max() < 1e-3  # in half precision
    assert (ours[name] - load_file(next((tmp_path / "1" / "0" / "export").rglob("unet/*.safetensors")))[name]).any()


@pytest.mark.parametrize("wrong", ["0", "2.5", "all"])
def test_how_many_at_once_is_checked_first(
    wrong: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*settings, *LAUNCHER, "optimizer.lr=1e-3,1e-4", f"hydra.launcher.max_concurrent_runs={wrong}"]
    assert train(*own, f"hydra.sweep.dir={tmp_path}/sweep") == 2
    assert "hydra.launcher.max_concurrent_runs: " in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("wrong", ["0", "[]"])
def test_devices_are_checked_though_each_job_has_one(
    wrong: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*settings, *LAUNCHER, "optimizer.lr=1e-3,1e-4", f"hardware.devices={wrong}"]
    assert train(*own, f"hydra.sweep.dir={tmp_path}/sweep") == 2
    assert "hardware.devices: " in capsys.readouterr().err


def test_gpus_are_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    node: dict[str, object] = {"accelerator": "gpu"}
    for devices, wanted in ((1, [0]), ([1], [1]), ("2,3", [2, 3]), ("auto", [0, 1, 2, 3]), (2, [0, 1])):
        found = shared_group.devices_of({**node, "devices": devices})
        assert found == [torch.device("cuda", index) for index in wanted]
    assert shared_group.devices_of({"accelerator": "cpu", "devices": 2}) == [torch.device("cpu")] * 2


@pytest.mark.slow
def test_asked_to_stop_before_the_first_step_all_leave_at_once(settings: list[str], tmp_path: Path) -> None:
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = [*settings, "callbacks.samples.sampling.steps=900", "callbacks.samples.sampling.sampler=ddim", *LAUNCHER]
    process = start(log, *own, "optimizer.lr=1e-3,1e-4", f"hydra.sweep.dir={sweep}")
    while "trained: " not in log.read_text() and process.poll() is None:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert not list(sweep.glob("*/artifact"))
    assert [json.loads(file.read_text())["state"] for file in sweep.glob("*/job.json")] == ["unfinished"] * 2


@pytest.mark.slow
def test_asked_to_stop_a_job_that_draws_does_not_keep_the_others(settings: list[str], tmp_path: Path) -> None:
    """The first has steps behind it, the second stands before its first one."""
    sweep, log = tmp_path / "sweep", tmp_path / "log"
    own = [a for a in settings if not a.startswith("trainer.max_steps")]
    own += ["callbacks.samples.sampling.steps=100", "callbacks.samples.every_steps=2", *LAUNCHER]
    process = start(log, *own, "optimizer.lr=1e-3,1e-4", "trainer.max_steps=4000", f"hydra.sweep.dir={sweep}")
    wait_for_step(process, sweep / "1", 3, log)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    for job in "01":
        last = max((sweep / job / "checkpoints").glob("step*.ckpt")).stem
        assert rows(sweep / job)[-1]["step"] == str(int(last.removeprefix("step")))
        assert (sweep / job / "artifact" / "mine.safetensors").is_file()


BASE = {
    "method": {"_target_": "sdtune.methods.LoRA", "rank": 4},
    "backbone": {"_target_": "sdtune.backbone.Pretrained", "path": "pocket"},
    "hardware": {"devices": 1, "strategy": "auto"},
    "data": {"batch_size": 2, "resolution": None, "class_prompt": None},
    "trainer": {"max_steps": 3},
    "seed": 0,
}


class Wider(LoRA):
    """A user's own."""

    reads_denoiser_only = False


def changed(group: str, **settings: object) -> dict[str, object]:
    return {**BASE, group: {**BASE[group], **settings}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (changed("method", rank=8), None),
        (changed("data", path="elsewhere", flip=True), None),
        ({**BASE, "seed": 1}, None),
        (changed("data", batch_size=4), "data.batch_size"),
        (changed("data", class_prompt="a dog"), "data.class_prompt"),
        (changed("trainer", max_steps=4), "trainer.max_steps"),
        (changed("trainer", gradient_clip_val=0.5), None),
        (changed("backbone", path="other"), "backbone.path"),
    ],
)
def test_settings_may_differ_and_the_model_may_not(other: dict[str, object], key: str | None) -> None:
    assert difference(BASE, other) == key
    assert len(groups([BASE, other])) == (1 if key is None else 2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (changed("hardware", offload=True), "hardware.offload"),
        (changed("hardware", num_nodes=2), "hardware.num_nodes"),
        (changed("method", _target_="sdtune.methods.ControlNet"), "method: ControlNet"),
        (changed("backbone", from_scratch=["unet"]), "backbone.from_scratch"),
        (changed("trainer", detect_anomaly=True), "trainer.detect_anomaly"),
        ({**changed("method", _target_=f"{__name__}.Wider"), "trust": [__name__]}, "method: Wider may train more than"),
    ],
)
def test_who_can_share_with_none(config: dict[str, object], reason: str) -> None:
    [one, two] = groups([config, config])
    assert one.alone is not None
    assert one.alone.startswith(reason)
    assert two.jobs == [1]
