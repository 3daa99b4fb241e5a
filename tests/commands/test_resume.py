"""A run that was killed or stopped and then resumed equals an uninterrupted run bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from running import arguments, rows, start, train, wait_for_step
from sdtune.commands.train_run import TrainRun

EVERY = 5


def assert_equal_runs(run: Path, reference: Path) -> None:
    """Compare the metrics of each step, the tensors of the artifact, and the final metrics."""
    assert (run / "metrics.csv").read_text(encoding="utf-8") == (reference / "metrics.csv").read_text(encoding="utf-8")
    for file in ("mine.safetensors", "pytorch_lora_weights.safetensors"):
        tensors, reference_tensors = load_file(run / "artifact" / file), load_file(reference / "artifact" / file)
        assert tensors.keys() == reference_tensors.keys()
        assert all(torch.equal(value, reference_tensors[key]) for key, value in tensors.items())
        assert any(value.any() for key, value in tensors.items() if "lora_up" in key or "lora_B" in key)
    metrics = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (run, reference)]
    assert metrics[0]["steps"] == metrics[1]["steps"]
    assert metrics[0]["validation_loss"] == metrics[1]["validation_loss"]


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
def test_killed_and_resumed_run_equals_uninterrupted_run(
    variant: str, tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = 20
    common = ["name=mine", f"trainer.max_steps={steps}", f"checkpoint.every_steps={EVERY}", "optimizer.lr=1e-3"]
    common += VARIANTS[variant]
    run, reference, log = tmp_path / "run", tmp_path / "reference", tmp_path / "killed.log"
    assert train(*arguments(tiny, images, reference, *common)) == 0

    process = start(log, *arguments(tiny, images, run, *common))
    wait_for_step(process, run, random.randint(EVERY + 1, 2 * EVERY + 1), log)
    process.kill()
    process.wait()
    assert not (run / "metrics.json").exists()
    assert not (run / "artifact").exists()
    killed_at = int(rows(run)[-1]["step"])
    assert killed_at < steps, "the run ended before it was killed"

    capsys.readouterr()
    assert train(f"resume={run}") == 0
    [message] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming at step ")]
    resumed_at = int(message.split()[3])
    assert 0 < resumed_at <= killed_at
    assert killed_at - resumed_at <= EVERY
    assert message in (run / "train.log").read_text(encoding="utf-8")
    assert_equal_runs(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_stopped_and_resumed_run_equals_uninterrupted_run(
    signal_number: signal.Signals, code: int, tiny: Path, images: Path, tmp_path: Path
) -> None:
    common = ["name=mine", "trainer.max_steps=40", "checkpoint.every_steps=100", "optimizer.lr=1e-3", "data.workers=1"]
    common += ["data.hold_out=5", "trainer.val_check_interval=7"]
    run, reference, log = tmp_path / "run", tmp_path / "reference", tmp_path / "stopped.log"
    process = start(log, *arguments(tiny, images, run, *common))
    wait_for_step(process, run, 3, log)
    # Ctrl-C of a terminal and SIGTERM of a scheduler also reach the data loader workers.
    os.killpg(process.pid, signal_number)
    assert process.wait(timeout=200) == code
    stopped_at = int(rows(run)[-1]["step"])
    assert 3 <= stopped_at < 40
    *_, first, last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("sdtune:")]
    assert first == "sdtune: stopping and saving after the current step; Ctrl-C again stops immediately"
    assert last == (
        f"sdtune: stopped at step {stopped_at}; checkpoint and artifact are saved;"
        f" continue it with: sdtune train resume={run}"
    )
    checkpoints = {p.name for p in (run / "checkpoints").iterdir()}
    assert checkpoints - {"best.ckpt"} == {f"step{stopped_at:08d}.ckpt"}
    assert all(int(r["step"]) % 7 == 0 for r in rows(run) if r["validation_loss"])
    assert (run / "artifact" / "mine.safetensors").exists()
    assert not (run / "metrics.json").exists()

    assert train(f"resume={run}") == 0
    assert train(*arguments(tiny, images, reference, *common)) == 0
    assert_equal_runs(run, reference)


def test_finished_run_can_be_extended(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["name=mine", "checkpoint.every_steps=3", "optimizer.lr=1e-3", "data.hold_out=5"]
    common += ["trainer.val_check_interval=2"]
    run, reference = tmp_path / "run", tmp_path / "reference"
    assert train(*arguments(tiny, images, run, *common, "trainer.max_steps=4")) == 0
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["steps"] == 4
    assert train(f"resume={run}") == 2
    assert "is complete at step 4; set a larger trainer.max_steps" in capsys.readouterr().err
    assert train(f"resume={run}", "optimizer.lr=1e-2") == 2
    assert "optimizer.lr=1e-2 is not allowed in a resumed run" in capsys.readouterr().err
    assert train(f"resume={run}", "trainer.max_steps=7") == 0
    assert "resuming at step 4" in capsys.readouterr().out
    assert (run / ".hydra" / "resume-1").is_dir()
    assert train(*arguments(tiny, images, reference, *common, "trainer.max_steps=7")) == 0
    assert_equal_runs(run, reference)


def test_second_resume_keeps_the_max_steps_of_the_first(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*arguments(tiny, images, run, "trainer.max_steps=2", "checkpoint.every_steps=1")) == 0
    assert train(f"resume={run}", "trainer.max_steps=4") == 0
    (run / "metrics.json").unlink()  # as if the run was stopped before it wrote its metrics
    assert train(f"resume={run}") == 0
    assert [row["step"] for row in rows(run)] == ["1", "2", "3", "4"]
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["steps"] == 4
    assert train(f"resume={run}", "trainer.max_steps=3") == 2
    assert len(rows(run)) == 4


def test_resume_with_a_changed_recipe_or_caption_is_refused(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = tmp_path / "conf" / "experiment"
    recipes.mkdir(parents=True)
    recipe = "# @package _global_\noptimizer:\n  lr: {}\n"
    (recipes / "mine.yaml").write_text(recipe.format(1e-3), encoding="utf-8")
    run = tmp_path / "run"
    common = ["-cd", str(recipes.parent), "experiment=mine", "trainer.max_steps=2"]
    assert train(*common, *arguments(tiny, images, run)) == 0

    resume = [f"resume={run}", "trainer.max_steps=4"]
    (recipes / "mine.yaml").write_text(recipe.format(2e-3), encoding="utf-8")
    assert train(*resume) == 2
    assert "optimizer.lr is 0.002 now and was 0.001" in capsys.readouterr().err
    (recipes / "mine.yaml").write_text(recipe.format(1e-3), encoding="utf-8")
    (images / "0.txt").write_text("another caption", encoding="utf-8")
    assert train(*resume) == 2
    assert "the data has changed since the run started" in capsys.readouterr().err
    assert len(rows(run)) == 2
    (images / "0.txt").write_text("picture number 0", encoding="utf-8")
    assert train(*resume) == 0
    assert len(rows(run)) == 4


def test_run_killed_at_its_last_step_is_resumed_to_all_outputs(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_arguments = [a for a in arguments(tiny, images, run, "trainer.max_steps=3") if a != "callbacks.samples=null"]
    run_arguments += ["callbacks.samples.sampling.steps=1", "callbacks.samples.seeds=[0]"]
    assert train(*run_arguments) == 0
    before = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    previews = {file: file.read_bytes() for file in (run / "samples").rglob("*.png")}
    # As if the run was killed immediately after the checkpoint of the last step.
    shutil.rmtree(run / "samples" / "step00000003")
    shutil.rmtree(run / "artifact")
    half_written = run / "artifact" / f"mine.{16 * 'ab'}.partial"
    (half_written / "unet").mkdir(parents=True)
    (run / "samples" / "before_after.png").unlink()
    (run / "metrics.json").unlink()
    assert train(f"resume={run}") == 0
    assert not half_written.exists()
    assert {file: file.read_bytes() for file in (run / "samples").rglob("*.png")} == previews
    after = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    costs = ("median_step_seconds", "images_per_second", "peak_memory_bytes", "trainable_parameters")
    assert {key: after[key] for key in costs} == {key: before[key] for key in costs}


@pytest.fixture
def finished(tiny: Path, images: Path, tmp_path: Path) -> Path:
    """Folder of a run of four steps with checkpoints at the steps 2 and 4."""
    overrides = ["name=mine", "trainer.max_steps=4", "checkpoint.every_steps=2", "optimizer.lr=1e-3"]
    assert train(*arguments(tiny, images, tmp_path / "reference", *overrides)) == 0
    return tmp_path / "reference"


def killed_copy(run: Path, folder: Path, steps: int) -> Path:
    """Copy of ``run`` as if it had been killed after ``steps`` steps (0, 2 or 4), without its outputs."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "artifact")
    (folder / "metrics.json").unlink()
    for checkpoint in (folder / "checkpoints").glob("step*.ckpt"):
        if int(checkpoint.stem.removeprefix("step")) > steps:
            checkpoint.unlink()
    return folder


@pytest.mark.parametrize("has_metrics", [False, True])
def test_run_killed_before_its_first_checkpoint_starts_from_its_beginning(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], has_metrics: bool
) -> None:
    run = killed_copy(finished, tmp_path / "run", steps=0)
    if not has_metrics:
        (run / "metrics.csv").unlink()
        shutil.rmtree(run / "checkpoints")
    capsys.readouterr()
    assert train(f"resume={run}") == 0
    assert "there is no checkpoint yet; starting from the beginning" in capsys.readouterr().out
    assert_equal_runs(run, finished)


@pytest.mark.parametrize("size", [0, 1000, None])
def test_checkpoint_before_a_damaged_one_is_used(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int | None
) -> None:
    run = killed_copy(finished, tmp_path / "run", steps=4)
    newest = run / "checkpoints" / "step00000004.ckpt"
    content = bytearray(newest.read_bytes())
    if size is None:
        with zipfile.ZipFile(newest) as archive:
            [largest] = sorted(archive.infolist(), key=lambda entry: entry.file_size)[-1:]
        content[largest.header_offset + largest.file_size] ^= 1  # a single bit of a tensor
    newest.write_bytes(content[:size])
    capsys.readouterr()
    assert train(f"resume={run}") == 0
    output = capsys.readouterr().out
    assert f"WARNING: {newest} is damaged; continuing from the checkpoint before it" in output
    assert "resuming at step 2 from" in output
    assert_equal_runs(run, finished)


def test_run_with_only_damaged_checkpoints_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = killed_copy(finished, tmp_path / "run", steps=4)
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.write_bytes(b"")
    capsys.readouterr()
    assert train(f"resume={run}") == 2
    assert "sdtune: resume: all checkpoints are damaged, the newest is" in capsys.readouterr().err


def test_metrics_of_a_finished_run_stay_until_the_trainer_exists(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no trainer")

    run = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(TrainRun, "_training_trainer", fails)
    with pytest.raises(RuntimeError, match="no trainer"):
        train(f"resume={run}", "trainer.max_steps=9")
    assert (run / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()


@pytest.mark.parametrize("refused", ["hardware=mps", "hardware.devices=[1]", "hardware=gpu"])
def test_refused_extension_leaves_a_finished_run_as_it_is(
    refused: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = shutil.copytree(finished, tmp_path / "run")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert train(f"resume={run}", "trainer.max_steps=9", refused) == 2
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_the_same_command_starts_continues_and_ends(
    finished: Path, tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    overrides = ["name=mine", "trainer.max_steps=4", "checkpoint.every_steps=2", "optimizer.lr=1e-3"]
    text = "data.prompt=a photo, without captions"  # is quoted for Hydra before it is compared with the saved one
    command = [*arguments(tiny, images, run, *overrides), text, "resume=auto"]
    same = [*command[:-2], 'data.prompt="a photo, without captions"', "resume=auto"]
    assert train(*command) == 0
    assert_equal_runs(run, finished)
    for steps, line in ((0, None), (2, "resuming at step 2 from")):
        killed = killed_copy(run, tmp_path / "killed", steps)
        (killed / "checkpoints" / "best.ckpt").touch()
        shutil.rmtree(run)
        shutil.move(killed, run)
        capsys.readouterr()
        assert train(*command) == 0
        output = capsys.readouterr().out
        assert line is None or line in output
        assert_equal_runs(run, finished)
    for repeated in (command, same):
        assert train(*repeated) == 0
        assert capsys.readouterr().out.endswith(f"sdtune: {run} is complete\n")
    shutil.copytree(run, tmp_path / "slim")
    shutil.rmtree(tmp_path / "slim" / "checkpoints")  # to save disk space
    slim = [text.replace(str(run), str(tmp_path / "slim")) for text in command]
    assert train(*slim) == 0
    assert capsys.readouterr().out.endswith("slim is complete\n")
    assert train(*slim, "trainer.max_steps=5") == 2
    assert "slim contains a complete run without checkpoints; use another folder" in capsys.readouterr().err
    assert train(*command, "optimizer.lr=1e-4") == 2
    assert "optimizer.lr=1e-4 is not allowed in a resumed run" in capsys.readouterr().err
    assert train(*command, "trainer.max_steps=5") == 0
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["steps"] == 5
    without_folder = [text for text in command if not text.startswith("hydra.run.dir=")]
    assert train(*without_folder) == 2
    assert (
        "sdtune: hydra.run.dir: required with resume=auto, without interpolations; set hydra.run.dir=DIR"
        in capsys.readouterr().err
    )


def test_run_is_resumed_with_moved_images_and_backbone(
    finished: Path, tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = killed_copy(finished, tmp_path / "run", steps=2)
    moved_images = shutil.copytree(images, tmp_path / "elsewhere" / images.name)
    moved_backbone = shutil.copytree(tiny, tmp_path / "elsewhere" / "backbone")
    moved = [f"data.path={moved_images}", f"backbone.path={moved_backbone}"]
    assert train(f"resume={run}", *moved) == 0
    assert_equal_runs(run, finished)

    other = killed_copy(finished, tmp_path / "other", steps=2)
    next(moved_images.glob("*.txt"), moved_images / "0.txt").write_text("another caption", encoding="utf-8")
    capsys.readouterr()
    assert train(f"resume={other}", *moved) == 2
    assert "the data has changed since the run started" in capsys.readouterr().err
