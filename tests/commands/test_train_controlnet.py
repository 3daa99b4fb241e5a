"""``sdtune train method=controlnet``: missing maps, previews with maps, resume, evaluation, sampling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from drawings import save_drawings
from running import arguments, sample, train


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    return save_drawings(tmp_path / "drawings")


def command(tiny: Path, data: Path, folder: Path, *more: str) -> list[str]:
    common = [a for a in arguments(tiny, data, folder) if not a.startswith("method")]
    return [*common, "method=controlnet", "data/control=canny", "name=edges", "optimizer.lr=1e-2", *more]


def test_training_without_maps_is_refused(
    tiny: Path, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*command(tiny, drawings, tmp_path / "run", "data/control=none")) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sdtune: data.control: method=controlnet needs a control map")
    assert not (tmp_path / "run").exists()


def test_run_writes_previews_metrics_and_a_controlnet_that_samples(
    tiny: Path, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    argv = [a for a in command(tiny, drawings, run) if a not in ("callbacks.samples=null", "evaluation=none")]
    short = ["trainer.max_steps=3", "save_every=2", "callbacks.samples.sampling.steps=2", "data.hold_out=2"]
    short += ["callbacks.samples.seeds=[0,1]", "callbacks.samples.every_steps=null"]
    assert train(*argv, *short, "evaluation.sampling.steps=2", "evaluation.images=2", "backbone.clip=pocket") == 0
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["clip_text"] != metrics["base_clip_text"]
    assert metrics["trainable_parameters"] > 0

    # One column per held-out image (two), the maps in the first row, one row per seed below.
    tile, left, top = 160 + 6, 120 + 6, 62 + 6
    before, after, before_after = (
        np.asarray(Image.open(run / "samples" / f"{n}.png")) for n in ("step00000000", "step00000003", "before_after")
    )
    assert before.shape == after.shape == (62 + 3 * tile + 6, 120 + 2 * tile + 6, 3)
    assert before_after.shape == (62 + 5 * tile + 6, 120 + 2 * tile + 6, 3)
    maps = np.s_[top : top + 160, left : left + 160]
    assert set(np.unique(before[maps])) == {0, 255}
    assert all(np.array_equal(sheet[maps], before[maps]) for sheet in (after, before_after))
    assert not np.array_equal(before[top + tile :], after[top + tile :])

    artifact_files = sorted(p.name for p in (run / "artifact").iterdir())
    assert artifact_files == ["README.md", "edges", "edges-best", "edges-step00000002", "samples.png"]
    card = (run / "artifact" / "README.md").read_text(encoding="utf-8")
    assert "`ControlNetModel.from_pretrained('edges')`" in card
    assert json.loads((run / "artifact" / "edges" / "sdtune.json").read_text(encoding="utf-8"))["preprocess"] == "canny"
    stdout = capsys.readouterr().out
    assert f"ControlNet for diffusers: {run / 'artifact' / 'edges'}" in stdout
    assert "image: FILE, preprocess: canny}]" in stdout
    entry = f"control=[{{path:{run / 'artifact' / 'edges'},image:{drawings / '1.png'},preprocess:canny}}]"
    backbone = ["backbone=sd15", f"backbone.path={tiny}", "hardware=cpu", "sampling.steps=2"]
    assert sample(*backbone, "prompt=a fox", entry, f"hydra.run.dir={tmp_path / 'sampled'}") == 0


def test_resumed_run_equals_uninterrupted_run(tiny: Path, drawings: Path, tmp_path: Path) -> None:
    full, resumed = tmp_path / "full", tmp_path / "resumed"
    more = ["method.denoiser=decoder", "method.denoiser_lr=1e-3", "data.flip=true"]
    assert train(*command(tiny, drawings, full, *more, "trainer.max_steps=4")) == 0
    assert train(*command(tiny, drawings, resumed, *more, "trainer.max_steps=2")) == 0
    assert train(f"resume={resumed}", "trainer.max_steps=4") == 0
    assert (resumed / "metrics.csv").read_bytes() == (full / "metrics.csv").read_bytes()
    for file in ("diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        resumed_weights, full_weights = (load_file(run / "artifact" / "edges" / file) for run in (resumed, full))
        assert all(np.array_equal(value, full_weights[key]) for key, value in resumed_weights.items())
