"""Runs that share a backbone leave what each would have left alone."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from running import EPS, arguments, rows, train
from sdtune.backbone import cpu_convolution

LAUNCHER = ("hydra/launcher=shared_backbone", "hydra.launcher.processes=1")
STEPS = 20


@pytest.fixture
def settings(tiny: Path, images: Path, tmp_path: Path) -> list[str]:
    own = arguments(tiny, images, tmp_path, "name=mine", f"trainer.max_steps={STEPS}", "lr_schedule=cosine")
    return ["-m", *(a for a in own if not a.startswith(("hydra.run.dir", "method.rank")))]


def sweep(folder: Path, settings: list[str], *more: str, code: int = 0) -> Path:
    assert train(*settings, f"hydra.sweep.dir={folder}", *more) == code
    return folder


def trained(run: Path) -> dict[str, Tensor]:
    """Of the last checkpoint."""
    kept: dict[str, Any] = torch.load(max((run / "checkpoints").glob("step*.ckpt")), weights_only=True)
    found: dict[str, Tensor] = kept["state_dict"]
    return found


def distance(one: Path, other: Path, of_norm: bool = True) -> float:
    """The largest difference between a tensor of two runs, as a share of its norm or as it is."""
    here, there = trained(one), trained(other)
    assert here.keys() == there.keys()
    return max(
        float((t - there[n]).norm() / there[n].norm()) if of_norm else float((t - there[n]).abs().max())
        for n, t in here.items()
    )


GRIDS = {"1,16": "1e-2,1e-4", "1,4,8,16": "1e-2,1e-3,3e-4,1e-4"}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", ["1,16", pytest.param("1,4,8,16", marks=pytest.mark.slow)])
def test_ranks_and_rates_in_float64(ranks: str, settings: list[str], tmp_path: Path) -> None:
    own = [*settings, "hardware.precision=64-true", f"method.rank={ranks}", f"optimizer.lr={GRIDS[ranks]}"]
    together = sweep(tmp_path / "together", own, *LAUNCHER)
    assert torch.get_default_dtype() == torch.float32  # which Lightning changes for a step, whoever's turn comes in it
    alone = sweep(tmp_path / "alone", own)
    jobs = sorted(folder.name for folder in alone.glob("[0-9]*"))
    assert len(jobs) == len(ranks.split(",")) ** 2
    assert max(distance(together / job, alone / job, of_norm=False) for job in jobs) < 1e-9
    # Not because nothing happened.
    assert distance(together / "0", together / "1", of_norm=False) > 1e-4
    for job in jobs:
        ours, theirs = rows(together / job), rows(alone / job)
        assert [row["lr/unet"] for row in ours] == [row["lr/unet"] for row in theirs]
        assert [float(r["loss"]) for r in ours] == pytest.approx([float(r["loss"]) for r in theirs], rel=1e-6)


VARIANTS = {
    "every site, and ranks of its own": [
        "method.targets=[cross_attention,self_attention,feed_forward,convolutions,text_encoder]",
        "method.alpha_policy=constant",
        "method.alpha=4,2",
        "method.blocks={unet.mid_block: {rank: 3, alpha: 3}}",
        "method.rank=2",
    ],
    "accumulation, checkpointing and an average": [
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
    "seeds and decay": ["method.rank=2", "seed=0,1", "optimizer.weight_decay=0,0.1"],
    "other sites": ["method.rank=4", "method.targets=[cross_attention],[self_attention],[feed_forward]"],
    "words": ["method=textual_inversion", 'new_tokens=[{token: "<x>", init: a}]', "tokens_lr=1e-2,1e-3"],
    "pairs with a class": ["method.rank=2,4", "data.class_prompt=a fox", "data.class_images=3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_in_float32(variant: str, settings: list[str], tmp_path: Path) -> None:
    own = [*settings, *VARIANTS[variant], "optimizer.lr=1e-3", EPS]
    if variant == "words":
        own = [*(o for o in own if o != "method=lora"), "data.templates=['{} <x>']"]
    together, alone = sweep(tmp_path / "together", own, *LAUNCHER), sweep(tmp_path / "alone", own)
    jobs = sorted(folder.name for folder in alone.glob("[0-9]*"))
    assert len(jobs) > 1
    assert max(distance(together / job, alone / job) for job in jobs) < 1e-4
    for job in jobs:
        ours, theirs = rows(together / job), rows(alone / job)
        assert ours[0].keys() == theirs[0].keys()
        assert [r["step"] for r in ours] == [r["step"] for r in theirs]


@pytest.mark.slow
def test_in_half_precision_no_further_than_splits_of_a_batch(settings: list[str], tmp_path: Path) -> None:
    own = [*settings, "hardware.precision=bf16-mixed", "method.rank=4", "data.batch_size=4", "optimizer.lr=1e-3"]
    splits = sweep(tmp_path / "splits", own, "trainer.accumulate_grad_batches=1,2,4")
    together = sweep(tmp_path / "together", own, "optimizer.weight_decay=0.01,0.02,0.03", *LAUNCHER)
    alone = sweep(tmp_path / "alone", own, "optimizer.weight_decay=0.01,0.02,0.03")
    usual = median(distance(splits / a, splits / b) for a, b in ("01", "02", "12"))
    assert max(distance(together / job, alone / job) for job in "012") < 2 * usual


AROUND = {
    "plain": [],
    "dropout": ["method.dropout=0.3"],
    "convolutions": ["method.targets=[cross_attention,convolutions]"],
    "all of it again in backward": ["method.dropout=0.3", "hardware.gradient_checkpointing=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("other", ["3e-4", "1e30"])
def test_a_neighbour_moves_nothing(other: str, around: str, settings: list[str], tmp_path: Path) -> None:
    own = [*settings, "method.rank=2", *AROUND[around], *LAUNCHER]
    quiet = sweep(tmp_path / "quiet", own, "optimizer.lr=1e-3,1e-4,1e-5")
    loud = sweep(tmp_path / "loud", own, f"optimizer.lr=1e-3,{other},1e-5", code=1 if other == "1e30" else 0)
    for job in "02":
        assert distance(quiet / job, loud / job) == 0
        assert (quiet / job / "metrics.csv").read_text() == (loud / job / "metrics.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND)
def test_who_takes_a_place_moves_nothing(around: str, settings: list[str], tmp_path: Path) -> None:
    """The next one has wider pairs and comes in the middle, and is validated while the others are in a step."""
    own = [*settings, *AROUND[around], *LAUNCHER, "hydra.launcher.max_concurrent_runs=2", "method.rank=2,16"]
    own += ["data.hold_out=5", "trainer.val_check_interval=3"]
    quiet = sweep(tmp_path / "quiet", own, "optimizer.lr=1e-3,1e-4")
    loud = sweep(tmp_path / "loud", own, "optimizer.lr=1e-3,1e30", code=1)
    assert (loud / "2" / "metrics.json").is_file()
    assert distance(quiet / "0", loud / "0") == 0


@pytest.mark.slow
def test_a_subject_each(settings: list[str], tiny: Path, tmp_path: Path) -> None:
    for number in range(3):
        folder = tmp_path / f"subject{number}"
        folder.mkdir()
        for i in range(2):
            noise = np.random.default_rng([number, i]).integers(0, 256, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{i}.png")
    shown = ",".join(str(tmp_path / f"subject{number}") for number in range(3))
    own = [*(s for s in settings if not s.startswith("data.path")), f"data.path={shown}", "data.prompt=a photo of sks"]
    own += ["method.rank=2", "optimizer.lr=1e-3", "name=null", EPS]
    together, alone = sweep(tmp_path / "together", own, *LAUNCHER), sweep(tmp_path / "alone", own)
    assert max(distance(together / job, alone / job) for job in "012") < 1e-4
    assert distance(together / "0", together / "1") > 1e-3


@pytest.mark.slow
def test_shapes_that_differ_from_step_to_step(settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "aspects"
    folder.mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (36, 56, 3) if i % 2 else (56, 36, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    own = [*(s for s in settings if not s.startswith("data.path")), f"data.path={folder}", "data.prompt=a photo of sks"]
    own += ["data.batch_size=1", "method.rank=2", "seed=0,1,2", "optimizer.lr=1e-3", EPS]
    together, alone = sweep(tmp_path / "together", own, *LAUNCHER), sweep(tmp_path / "alone", own)
    assert max(distance(together / job, alone / job) for job in "012") < 1e-4


@pytest.mark.slow
def test_convolutions_that_are_products_alone_and_not_together(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_convolution, "_WEIGHTS", 1)
    monkeypatch.setattr(cpu_convolution, "_PIXELS", 256)  # of 1,024 in the first convolution of four runs
    own = [*settings, "method.targets=[cross_attention,convolutions]", "method.rank=2,4", "seed=0,1", EPS]
    own += ["optimizer.lr=1e-3"]
    together, alone = sweep(tmp_path / "together", own, *LAUNCHER), sweep(tmp_path / "alone", own)
    assert max(distance(together / job, alone / job) for job in "0123") < 1e-4
