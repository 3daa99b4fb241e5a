"""Samples and snapshots: written at the configured steps, without influence on the training."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from running import arguments, train
from sdtune.callbacks import Samples
from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.methods import LoRA
from sdtune.sampling.loop import Sampling


def test_grids_and_snapshots_do_not_change_the_training(tiny: Path, images: Path, tmp_path: Path) -> None:
    """With dropout, training depends on the global generator and on the training mode of the modules."""
    overrides = ["trainer.max_steps=5", "method.dropout=0.3", "optimizer.lr=1e-2", "name=otter"]
    sample_overrides = [
        "callbacks.samples.prompts=[a fox,a red fox,two foxes]",
        "callbacks.samples.seeds=[0,1]",
        "callbacks.samples.every_steps=2",
        "callbacks.samples.sampling.steps=2",
        "+callbacks.samples.sampling.sampler=euler_ancestral",
        "save_every=2",
    ]
    plain, with_samples = tmp_path / "plain", tmp_path / "drawn"
    assert train(*arguments(tiny, images, plain, *overrides)) == 0
    command = [a for a in arguments(tiny, images, with_samples, *overrides) if a != "callbacks.samples=null"]
    assert train(*command, *sample_overrides) == 0

    assert (with_samples / "metrics.csv").read_bytes() == (plain / "metrics.csv").read_bytes()
    weights, plain_weights = (load_file(run / "artifact" / "otter.safetensors") for run in (with_samples, plain))
    assert all(np.array_equal(value, plain_weights[key]) for key, value in weights.items())

    names = [f"step{step:08d}.png" for step in (0, 2, 4, 5)]
    snapshots = [f"otter-step{step:08d}" for step in (2, 4)]
    assert sorted(p.name for p in (with_samples / "samples").iterdir()) == sorted(
        [*names, *(name[:-4] for name in names), "before_after.png", *(f"{s}.png" for s in snapshots)]
    )
    assert not (plain / "samples").exists()
    before, after, before_after = (
        np.asarray(Image.open(with_samples / "samples" / name)) for name in (names[0], names[-1], "before_after.png")
    )
    assert before.shape == after.shape
    assert not np.array_equal(before, after)
    tile = 160 + 6
    assert before.shape[:2] == (62 + 2 * tile + 6, 120 + 3 * tile + 6)
    assert before_after.shape[:2] == (62 + 4 * tile + 6, 120 + 3 * tile + 6)
    for row in (0, 1):  # before and after alternate
        image = np.s_[62 + 6 + row * tile : 62 + row * tile + tile, 126:]
        mixed = np.s_[62 + 6 + 2 * row * tile : 62 + 2 * row * tile + tile, 126:]
        assert np.array_equal(before_after[mixed], before[image])

    files = sorted(p.name for p in (with_samples / "artifact").glob("otter-*"))
    assert files == [f"{s}.safetensors" for s in snapshots]
    first, last = (load_file(with_samples / "artifact" / f"{s}.safetensors") for s in snapshots)
    assert first.keys() == last.keys() == weights.keys()
    assert any(not np.array_equal(first[key], last[key]) for key in first)


def test_images_of_other_sampling_settings_are_not_used_as_before(tmp_path: Path) -> None:
    """A run resumed with other sampling settings must not compare its last images with the first ones."""

    def samples(steps: int) -> Samples:
        return Samples(tmp_path, MetricsRecorder(tmp_path), sampling=Sampling(steps=steps))

    first = samples(30)
    first.first = [[np.zeros((2, 2, 3), dtype=np.uint8)]]
    same, other = samples(30), samples(2)
    same.load_state_dict(first.state_dict())
    other.load_state_dict(first.state_dict())
    assert same.first is not None
    assert np.array_equal(same.first[0][0], first.first[0][0])
    assert other.first is None


def test_stopped_run_generates_no_samples_on_its_way_out(tiny: Path, images: Path, tmp_path: Path) -> None:
    """A scheduler gives little time between SIGTERM and SIGKILL; the resumed run generates them."""
    run = tmp_path / "run"
    overrides = ["trainer.max_steps=3", "callbacks.samples.sampling.steps=1", "trust=[running]"]
    overrides += ["callbacks.samples.every_steps=null"]
    command = [a for a in arguments(tiny, images, run, *overrides) if a != "callbacks.samples=null"]
    assert train(*command, "+callbacks.stop={_target_: running.StopAt, step: 2}") == 128 + signal.SIGTERM
    names = ["step00000000", "step00000000.png"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == names
    assert train(f"resume={run}") == 0
    assert sorted(p.name for p in (run / "samples").iterdir()) == sorted(
        [*names, "before_after.png", "step00000003", "step00000003.png"]
    )


def test_stop_interrupts_the_samples_that_are_being_generated(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_denoise, calls = LoRA.denoise, 0

    def denoise(model: LoRA, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 10:
            signal.raise_signal(signal.SIGTERM)
        return real_denoise(model, *args)

    monkeypatch.setattr(LoRA, "denoise", denoise)
    run = tmp_path / "run"
    overrides = ["trainer.max_steps=3", "callbacks.samples.every_steps=1", "callbacks.samples.sampling.steps=2"]
    overrides += [
        "callbacks.samples.sampling.batch_size=1",
        "callbacks.samples.prompts=[a,b]",
        "callbacks.samples.seeds=[0]",
    ]
    command = [a for a in arguments(tiny, images, run, *overrides) if a != "callbacks.samples=null"]
    assert train(*command) == 128 + signal.SIGTERM
    names = [f"step{step:08d}{suffix}" for step in (0, 1) for suffix in ("", ".png")]
    assert sorted(p.name for p in (run / "samples").iterdir()) == names
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step00000002.ckpt"]


@pytest.mark.parametrize(("steps", "expected"), [(1, [0, 1]), (3, [0, 1, 2, 3]), (8, [0, 3, 6, 8])])
def test_default_previews_are_before_after_and_two_on_the_way(
    steps: int, expected: list[int], tiny: Path, images: Path, tmp_path: Path
) -> None:
    settings = [f"trainer.max_steps={steps}", "callbacks.samples.sampling.steps=1"]
    command = [
        text for text in arguments(tiny, images, tmp_path / "run", *settings) if text != "callbacks.samples=null"
    ]
    assert train(*command) == 0
    grids = sorted((tmp_path / "run" / "samples").glob("step*.png"))
    assert [int(path.stem.removeprefix("step")) for path in grids] == expected
    assert len(list((tmp_path / "run" / "samples" / "step00000000").iterdir())) == 4
