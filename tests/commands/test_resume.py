"""A run that was killed or stopped, and resumed, is the run that never was: to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from running import arguments, rows, start, train, wait_for_step

EVERY = 5


def same(run: Path, reference: Path) -> None:
    """The metrics of every step, the artifact's tensors, the final metrics."""
    assert (run / "metrics.csv").read_text() == (reference / "metrics.csv").read_text()
    for file in ("mine.safetensors", "pytorch_lora_weights.safetensors"):
        ours, theirs = load_file(run / "artifact" / file), load_file(reference / "artifact" / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        assert any(value.any() for key, value in ours.items() if "lora_up" in key or "lora_B" in key)
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (run, reference)]
    assert figures[0]["steps"] == figures[1]["steps"]
    assert figures[0]["validation_loss"] == figures[1]["validation_loss"]


VARIANTS = {
    "accumulation and validation": [
        "data.batch_size=2",
        "trainer.accumulate_grad_batches=2",
        "data.hold_out=5",
        "trainer.val_check_interval=3",
    ],
    "plain": ["method.dropout=0.2", "lr_schedule=cosine", "data.hold_out=5", "trainer.val_check_interval=5"],
    "accumulation and average": [
        "data.batch_size=4",
        "trainer.accumulate_grad_batches=2",
        "callbacks.ema={_target_:sdtune.callbacks.EMA,decay:0.9}",
    ],
    "two workers": ["data.workers=2", "data.flip=true", "data.caption_dropout=0.3", "data.cache_latents=false"],
}


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[] if v == "accumulation and validation" else pytest.mark.slow) for v in VARIANTS]
)
def test_killed_and_resumed_is_never_killed(
    variant: str, tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = 30
    common = ["name=mine", f"trainer.max_steps={steps}", f"checkpoint.every_steps={EVERY}", "optimizer.lr=1e-3"]
    common += VARIANTS[variant]
    run, reference, log = tmp_path / "run", tmp_path / "reference", tmp_path / "killed.log"
    assert train(*arguments(tiny, images, reference, *common)) == 0

    process = start(log, *arguments(tiny, images, run, *common))
    wait_for_step(process, run, random.randint(EVERY + 1, steps - 8), log)
    process.kill()
    process.wait()
    assert not (run / "metrics.json").exists()
    assert not (run / "artifact").exists()
    k = int(rows(run)[-1]["step"])
    assert k < steps, "it was over before it could be killed"

    capsys.readouterr()
    assert train(f"resume={run}") == 0
    [said] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming at step ")]
    j = int(said.split()[3])
    assert 0 < j <= k
    assert k - j <= EVERY
    assert said in (run / "train.log").read_text()
    same(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(asked: signal.Signals, code: int, tiny: Path, images: Path, tmp_path: Path) -> None:
    common = ["name=mine", "trainer.max_steps=40", "checkpoint.every_steps=100", "optimizer.lr=1e-3", "data.workers=1"]
    common += ["data.hold_out=5", "trainer.val_check_interval=7"]
    run, reference, log = tmp_path / "run", tmp_path / "reference", tmp_path / "stopped.log"
    process = start(log, *arguments(tiny, images, run, *common))
    wait_for_step(process, run, 3, log)
    os.killpg(process.pid, asked)  # a terminal's Ctrl-C and a scheduler's SIGTERM reach the loader's workers too
    assert process.wait(timeout=200) == code
    stopped_at = int(rows(run)[-1]["step"])
    assert 3 <= stopped_at < 40
    last = log.read_text().splitlines()[-1]
    assert last == (
        f"sdtune: stopped at step {stopped_at}; checkpoint and artifact are saved."
        f" Go on with: sdtune train resume={run}"
    )
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert kept - {"best.ckpt"} == {f"step{stopped_at:08d}.ckpt"}
    assert all(int(r["step"]) % 7 == 0 for r in rows(run) if r["validation_loss"])
    assert (run / "artifact" / "mine.safetensors").exists()
    assert not (run / "metrics.json").exists()

    assert train(f"resume={run}") == 0
    assert train(*arguments(tiny, images, reference, *common)) == 0
    same(run, reference)


def test_a_finished_run_is_extended(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["name=mine", "checkpoint.every_steps=3", "optimizer.lr=1e-3", "data.hold_out=5"]
    common += ["trainer.val_check_interval=2"]
    run, reference = tmp_path / "run", tmp_path / "reference"
    assert train(*arguments(tiny, images, run, *common, "trainer.max_steps=4")) == 0
    assert json.loads((run / "metrics.json").read_text())["steps"] == 4
    assert train(f"resume={run}") == 2
    assert "is complete at step 4; give a larger trainer.max_steps=" in capsys.readouterr().err
    assert train(f"resume={run}", "optimizer.lr=1e-2") == 2
    assert "optimizer.lr=1e-2 would make it another run" in capsys.readouterr().err
    assert train(f"resume={run}", "trainer.max_steps=7") == 0
    assert "resuming at step 4" in capsys.readouterr().out
    assert (run / ".hydra" / "resume-1").is_dir()
    assert train(*arguments(tiny, images, reference, *common, "trainer.max_steps=7")) == 0
    same(run, reference)


def test_a_second_resume_keeps_what_the_first_extended(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*arguments(tiny, images, run, "trainer.max_steps=2", "checkpoint.every_steps=1")) == 0
    assert train(f"resume={run}", "trainer.max_steps=4") == 0
    (run / "metrics.json").unlink()  # as if it had been stopped before its metrics
    assert train(f"resume={run}") == 0
    assert [row["step"] for row in rows(run)] == ["1", "2", "3", "4"]
    assert json.loads((run / "metrics.json").read_text())["steps"] == 4
    assert train(f"resume={run}", "trainer.max_steps=3") == 2
    assert len(rows(run)) == 4


def test_what_changed_since_is_refused(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "conf" / "experiment"
    own.mkdir(parents=True)
    recipe = "# @package _global_\noptimizer:\n  lr: {}\n"
    (own / "mine.yaml").write_text(recipe.format(1e-3))
    run = tmp_path / "run"
    common = ["-cd", str(own.parent), "experiment=mine", "trainer.max_steps=2"]
    assert train(*common, *arguments(tiny, images, run)) == 0

    again = [f"resume={run}", "trainer.max_steps=4"]
    (own / "mine.yaml").write_text(recipe.format(2e-3))
    assert train(*again) == 2
    assert "optimizer.lr is 0.002 now and was 0.001" in capsys.readouterr().err
    (own / "mine.yaml").write_text(recipe.format(1e-3))
    (images / "0.txt").write_text("another caption")
    assert train(*again) == 2
    assert "captions or repeats have changed" in capsys.readouterr().err
    assert len(rows(run)) == 2
    (images / "0.txt").write_text("picture number 0")
    assert train(*again) == 0
    assert len(rows(run)) == 4


def test_killed_at_its_last_step_it_still_gets_its_last_samples_and_costs(
    tiny: Path, images: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    own = [a for a in arguments(tiny, images, run, "trainer.max_steps=3") if a != "callbacks.samples=null"]
    own += ["callbacks.samples.sampling.steps=1", "callbacks.samples.seeds=[0]"]
    assert train(*own) == 0
    before = json.loads((run / "metrics.json").read_text())
    drawn = {file.name: file.read_bytes() for file in (run / "samples").rglob("*.png")}
    # As if it had been killed right after the last step's checkpoint.
    shutil.rmtree(run / "samples" / "after")
    shutil.rmtree(run / "artifact")
    (run / "samples" / "before_after.png").unlink()
    (run / "metrics.json").unlink()
    assert train(f"resume={run}") == 0
    assert {file.name: file.read_bytes() for file in (run / "samples").rglob("*.png")} == drawn
    after = json.loads((run / "metrics.json").read_text())
    costs = ("median_step_seconds", "images_per_second", "peak_memory_bytes", "trainable_parameters")
    assert {key: after[key] for key in costs} == {key: before[key] for key in costs}
