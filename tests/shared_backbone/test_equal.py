"""Runs on a shared backbone have the same results as separate runs."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from families import SD3
from image_data import noise
from running import EPS, arguments, rows, train
from sdtune.backbone import cpu_convolution

LAUNCHER = ("hydra/launcher=shared_backbone", "hydra.launcher.processes=1")
STEPS = 20


@pytest.fixture
def settings(tiny: Path, images: Path, tmp_path: Path) -> list[str]:
    overrides = arguments(tiny, images, tmp_path, "name=mine", f"trainer.max_steps={STEPS}", "lr_schedule=cosine")
    return ["-m", *(a for a in overrides if not a.startswith(("hydra.run.dir", "method.rank")))]


def sweep(folder: Path, settings: list[str], *overrides: str, code: int = 0) -> Path:
    assert train(*settings, f"hydra.sweep.dir={folder}", *overrides) == code
    return folder


def trained_weights(run: Path) -> dict[str, Tensor]:
    """Trained weights in the last checkpoint of ``run``."""
    checkpoint: dict[str, Any] = torch.load(max((run / "checkpoints").glob("step*.ckpt")), weights_only=True)
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    return weights


def distance(one: Path, other: Path, relative: bool = True) -> float:
    """Largest difference of any weight of two runs: norm relative to the weight's norm, or absolute maximum."""
    weights, other_weights = trained_weights(one), trained_weights(other)
    assert weights.keys() == other_weights.keys()
    return max(
        float((t - other_weights[n]).norm() / other_weights[n].norm())
        if relative
        else float((t - other_weights[n]).abs().max())
        for n, t in weights.items()
    )


GRIDS = {"1,16": "1e-2", "1,4,8,16": "1e-2,1e-3,3e-4,1e-4"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("ranks", "steps"), [("1,16", 8), ("1,4,8,16", STEPS)])
def test_shared_runs_equal_separate_runs_in_float64(
    ranks: str, steps: int, settings: list[str], tmp_path: Path
) -> None:
    overrides = [
        *settings,
        f"trainer.max_steps={steps}",
        "hardware.precision=64-true",
        f"method.rank={ranks}",
        f"optimizer.lr={GRIDS[ranks]}",
    ]
    together = sweep(tmp_path / "together", overrides, *LAUNCHER)
    assert torch.get_default_dtype() == torch.float32  # Lightning changes it during a step, while other runs compute
    alone = sweep(tmp_path / "alone", overrides)
    jobs = sorted(folder.name for folder in alone.glob("[0-9]*"))
    assert len(jobs) == len(ranks.split(",")) * len(GRIDS[ranks].split(","))
    assert max(distance(together / job, alone / job, relative=False) for job in jobs) < 1e-9
    # The comparison is meaningful only if the runs differ from each other.
    assert distance(together / "0", together / "1", relative=False) > 1e-4
    for job in jobs:
        shared_rows, alone_rows = rows(together / job), rows(alone / job)
        assert [row["lr/denoiser"] for row in shared_rows] == [row["lr/denoiser"] for row in alone_rows]
        assert [float(r["loss"]) for r in shared_rows] == pytest.approx(
            [float(r["loss"]) for r in alone_rows], rel=1e-6
        )


VARIANTS = {
    "all targets, and ranks by block": [
        "method.targets=[cross_attention,self_attention,feed_forward,convolutions,text_encoder]",
        "method.alpha_policy=constant",
        "method.alpha=4,2",
        "method.blocks={denoiser.mid_block: {rank: 3, alpha: 3}}",
        "method.rank=2",
    ],
    "accumulation, checkpointing and EMA": [
        "method.rank=2,4",
        "data.batch_size=4",
        "trainer.accumulate_grad_batches=2",
        "hardware.gradient_checkpointing=true",
        "callbacks.ema={_target_:sdtune.callbacks.EMA,decay:0.9}",
    ],
    "validation and other data settings": [
        "method.rank=2",
        "data.hold_out=5",
        "trainer.val_check_interval=5",
        "data.caption_dropout=0,0.3",
        "data.cache_latents=false",
        "data.flip=true",
    ],
    "seeds and weight decay": ["method.rank=2", "seed=0,1", "optimizer.weight_decay=0,0.1"],
    "different targets": ["method.rank=4", "method.targets=[cross_attention],[self_attention],[feed_forward]"],
    "new tokens": ["method=textual_inversion", 'new_tokens=[{token: "<x>", init: a}]', "tokens_lr=1e-2,1e-3"],
    "quantized weights": ["method.rank=2,4", "backbone.quantize=fp8"],
    "class images": ["method.rank=2,4", "data.class_prompt=a fox", "data.class_images=3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd3_medium", "sd35_medium"])
def test_shared_runs_on_sd3_equal_separate_runs(
    family: SD3, sd3_folders: dict[SD3, Path], settings: list[str], tmp_path: Path
) -> None:
    for number in range(3):
        noise(tmp_path / "larger" / f"{number}.png", 96, 80, number, f"image number {number}")
    overrides = [o for o in settings if not o.startswith(("backbone", "data.path", "callbacks.samples"))]
    overrides += [f"backbone={family}", f"backbone.path={sd3_folders[family]}", "backbone.t5_tokens=12"]
    overrides += [f"data.path={tmp_path}/larger", "method.rank=2,4", "optimizer.lr=1e-3", EPS]
    overrides += ["callbacks.samples.sampling.steps=2", "evaluation=clip", "evaluation.images=2"]
    overrides += ["evaluation.sampling.steps=2", "evaluation.clip=pocket"]
    together, alone = sweep(tmp_path / "together", overrides, *LAUNCHER), sweep(tmp_path / "alone", overrides)
    for job in ("0", "1"):
        assert distance(together / job, alone / job) < 1e-3
        pictures = [np.asarray(Image.open(run / job / "samples/before_after.png")) for run in (together, alone)]
        assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_shared_runs_equal_separate_runs_in_float32(variant: str, settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, *VARIANTS[variant], "optimizer.lr=1e-3", EPS]
    if variant == "new tokens":
        overrides = [*(o for o in overrides if o != "method=lora"), "data.templates=['{} <x>']"]
    together, alone = sweep(tmp_path / "together", overrides, *LAUNCHER), sweep(tmp_path / "alone", overrides)
    jobs = sorted(folder.name for folder in alone.glob("[0-9]*"))
    assert len(jobs) > 1
    assert max(distance(together / job, alone / job) for job in jobs) < 1e-4
    for job in jobs:
        shared_rows, alone_rows = rows(together / job), rows(alone / job)
        assert shared_rows[0].keys() == alone_rows[0].keys()
        assert [r["step"] for r in shared_rows] == [r["step"] for r in alone_rows]


@pytest.mark.slow
def test_half_precision_differences_are_like_those_of_batch_splits(settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, "hardware.precision=bf16-mixed", "method.rank=4", "data.batch_size=4", "optimizer.lr=1e-3"]
    splits = sweep(tmp_path / "splits", overrides, "trainer.accumulate_grad_batches=1,2,4")
    together = sweep(tmp_path / "together", overrides, "optimizer.weight_decay=0.01,0.02,0.03", *LAUNCHER)
    alone = sweep(tmp_path / "alone", overrides, "optimizer.weight_decay=0.01,0.02,0.03")
    typical = median(distance(splits / a, splits / b) for a, b in ("01", "02", "12"))
    assert max(distance(together / job, alone / job) for job in "012") < 2 * typical


COMMON_SETTINGS = {
    "plain": [],
    "dropout": ["method.dropout=0.3"],
    "convolutions": ["method.targets=[cross_attention,convolutions]"],
    "gradient checkpointing": ["method.dropout=0.3", "hardware.gradient_checkpointing=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("common", COMMON_SETTINGS)
@pytest.mark.parametrize("other_rate", ["3e-4", "1e30"])
def test_another_run_does_not_change_the_results_of_a_run(
    other_rate: str, common: str, settings: list[str], tmp_path: Path
) -> None:
    overrides = [*settings, "method.rank=2", *COMMON_SETTINGS[common], *LAUNCHER]
    reference = sweep(tmp_path / "reference", overrides, "optimizer.lr=1e-3,1e-4,1e-5")
    changed = sweep(
        tmp_path / "changed", overrides, f"optimizer.lr=1e-3,{other_rate},1e-5", code=1 if other_rate == "1e30" else 0
    )
    for job in "02":
        assert distance(reference / job, changed / job) == 0
        assert (reference / job / "metrics.csv").read_text(encoding="utf-8") == (
            changed / job / "metrics.csv"
        ).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("common", COMMON_SETTINGS)
def test_run_that_replaces_an_ended_run_does_not_change_the_other_run(
    common: str, settings: list[str], tmp_path: Path
) -> None:
    """The next run has larger ranks, starts in the middle and validates while the other run is in a step."""
    overrides = [
        *settings,
        *COMMON_SETTINGS[common],
        *LAUNCHER,
        "hydra.launcher.max_concurrent_runs=2",
        "method.rank=2,16",
    ]
    overrides += ["data.hold_out=5", "trainer.val_check_interval=3"]
    reference = sweep(tmp_path / "reference", overrides, "optimizer.lr=1e-3,1e-4")
    changed = sweep(tmp_path / "changed", overrides, "optimizer.lr=1e-3,1e30", code=1)
    assert (changed / "2" / "metrics.json").is_file()
    assert distance(reference / "0", changed / "0") == 0


@pytest.mark.slow
def test_runs_with_different_subjects_equal_separate_runs(settings: list[str], tiny: Path, tmp_path: Path) -> None:
    for number in range(3):
        folder = tmp_path / f"subject{number}"
        folder.mkdir()
        for i in range(2):
            noise = np.random.default_rng([number, i]).integers(0, 256, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{i}.png")
    folders = ",".join(str(tmp_path / f"subject{number}") for number in range(3))
    overrides = [
        *(s for s in settings if not s.startswith("data.path")),
        f"data.path={folders}",
        "data.prompt=a photo of sks",
    ]
    overrides += ["method.rank=2", "optimizer.lr=1e-3", "name=null", EPS]
    together, alone = sweep(tmp_path / "together", overrides, *LAUNCHER), sweep(tmp_path / "alone", overrides)
    assert max(distance(together / job, alone / job) for job in "012") < 1e-4
    assert distance(together / "0", together / "1") > 1e-3


@pytest.mark.slow
def test_runs_with_different_image_shapes_equal_separate_runs(settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "aspects"
    folder.mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (36, 56, 3) if i % 2 else (56, 36, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    overrides = [
        *(s for s in settings if not s.startswith("data.path")),
        f"data.path={folder}",
        "data.prompt=a photo of sks",
    ]
    overrides += ["data.batch_size=1", "method.rank=2", "seed=0,1,2", "optimizer.lr=1e-3", EPS]
    together, alone = sweep(tmp_path / "together", overrides, *LAUNCHER), sweep(tmp_path / "alone", overrides)
    assert max(distance(together / job, alone / job) for job in "012") < 1e-4


@pytest.mark.slow
def test_convolutions_computed_differently_alone_give_equal_results(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_convolution, "_WEIGHTS", 1)
    monkeypatch.setattr(cpu_convolution, "_PIXELS", 256)  # the first convolution of four runs has 1,024 pixels
    overrides = [*settings, "method.targets=[cross_attention,convolutions]", "method.rank=2,4", "seed=0,1", EPS]
    overrides += ["optimizer.lr=1e-3"]
    together, alone = sweep(tmp_path / "together", overrides, *LAUNCHER), sweep(tmp_path / "alone", overrides)
    assert max(distance(together / job, alone / job) for job in "0123") < 1e-4
