"""``sdtune train method=controlnet``: refused without maps, previewed with them, resumed, measured, sampled."""

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


def test_without_maps_it_is_refused(
    tiny: Path, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*command(tiny, drawings, tmp_path / "run", "data/control=none")) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sdtune: data.control: method=controlnet learns from a map")
    assert not (tmp_path / "run").exists()


def test_a_run_from_preview_to_image(
    tiny: Path, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    argv = [a for a in command(tiny, drawings, run) if a not in ("callbacks.samples=null", "evaluation=none")]
    drawn = ["trainer.max_steps=3", "save_every=2", "callbacks.samples.sampling.steps=2", "data.hold_out=2"]
    assert train(*argv, *drawn, "evaluation.sampling.steps=2", "evaluation.images=2", "backbone.clip=pocket") == 0
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["clip_text"] != figures["base_clip_text"]
    assert figures["trainable_parameters"] > 0

    # Two held-out images: a column each, the maps as the first row, and a row a seed below.
    tile, left, top = 160 + 6, 120 + 6, 62 + 6
    before, after, both = (
        np.asarray(Image.open(run / "samples" / f"{n}.png")) for n in ("step00000000", "step00000003", "before_after")
    )
    assert before.shape == after.shape == (62 + 3 * tile + 6, 120 + 2 * tile + 6, 3)
    assert both.shape == (62 + 5 * tile + 6, 120 + 2 * tile + 6, 3)
    maps = np.s_[top : top + 160, left : left + 160]
    assert set(np.unique(before[maps])) == {0, 255}
    assert all(np.array_equal(sheet[maps], before[maps]) for sheet in (after, both))
    assert not np.array_equal(before[top + tile :], after[top + tile :])

    left = sorted(p.name for p in (run / "artifact").iterdir())
    assert left == ["README.md", "edges", "edges-best", "edges-step00000002", "samples.png"]
    assert json.loads((run / "artifact" / "edges" / "sdtune.json").read_text())["preprocess"] == "canny"
    said = capsys.readouterr().out
    assert f"ControlNet for diffusers: {run / 'artifact' / 'edges'}" in said
    assert "image: FILE, preprocess: canny}]" in said
    entry = f"control=[{{path:{run / 'artifact' / 'edges'},image:{drawings / '1.png'},preprocess:canny}}]"
    tiny_one = ["backbone=sd15", f"backbone.path={tiny}", "hardware=cpu", "sampling.steps=2"]
    assert sample(*tiny_one, "prompt=a fox", entry, f"hydra.run.dir={tmp_path / 'drawn'}") == 0


def test_a_resumed_run_ends_where_one_never_stopped_does(tiny: Path, drawings: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["method.unet=decoder", "method.unet_lr=1e-3", "data.flip=true"]
    assert train(*command(tiny, drawings, whole, *more, "trainer.max_steps=4")) == 0
    assert train(*command(tiny, drawings, parts, *more, "trainer.max_steps=2")) == 0
    assert train(f"resume={parts}", "trainer.max_steps=4") == 0
    assert (parts / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    for file in ("diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        ours, theirs = (load_file(run / "artifact" / "edges" / file) for run in (parts, whole))
        assert all(np.array_equal(value, theirs[key]) for key, value in ours.items())
