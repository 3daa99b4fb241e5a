"""EMA of the trained weights: its formula, and where it replaces them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from running import adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.callbacks import EMA
from sdtune.methods import LoRA


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.trainable()}


class WeightRecorder(Callback):
    """Records the weights after every optimizer step and the weights during validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.validated: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.seen.append(weights(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == len(self.seen):
            self.seen.append(weights(pl_module))

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.validated = weights(pl_module)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ema_follows_its_formula_and_replaces_weights_in_validation_and_export(
    tiny: Path, images: Path, accumulation: int
) -> None:
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-2))
    recorder, ema = WeightRecorder(), EMA(decay=0.25)
    fit(
        model,
        folder_data(images, hold_out=5),
        5,
        [ema, recorder],
        accumulate_grad_batches=accumulation,
        val_check_interval=5 * accumulation,
        check_val_every_n_epoch=None,
    )
    assert len(recorder.seen) == 6
    expected = {name: p.double() for name, p in recorder.seen[0].items()}
    for step, current in enumerate(recorder.seen[1:], 1):
        decay = min(0.25, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * current[name].double() for name in expected}
    for name, p in ema.shadow.items():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(recorder.validated[name], p)
    trained = weights(model)
    assert all(torch.equal(trained[name], recorder.seen[-1][name]) for name in trained)
    assert any(not torch.equal(trained[name], ema.shadow[name]) for name in trained)

    with model.final_weights():
        assert all(torch.equal(p, ema.shadow[name]) for name, p in model.trainable())
    assert all(torch.equal(p, trained[name]) for name, p in model.trainable())
    with pytest.raises(RuntimeError, match="inside"), model.final_weights():
        raise RuntimeError("inside")
    assert all(torch.equal(p, trained[name]) for name, p in model.trainable())


def test_resumed_ema_equals_uninterrupted_ema(tiny: Path, images: Path, tmp_path: Path) -> None:
    """With accumulation, the average must not change at a micro-batch without an optimizer step."""

    def run(steps: int, **settings: Any) -> tuple[EMA, pl.Trainer]:
        ema = EMA(decay=0.5)
        model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-2))
        return ema, fit(model, folder_data(images), steps, [ema], accumulate_grad_batches=2, **settings)

    uninterrupted, _ = run(5)
    first, trainer = run(3)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    assert (
        torch.load(tmp_path / "kept.ckpt", weights_only=True)["callbacks"]["EMA"]["shadow"].keys()
        == first.shadow.keys()
    )
    second, _ = run(5, ckpt_path=tmp_path / "kept.ckpt")
    assert all(torch.equal(second.shadow[name], p) for name, p in uninterrupted.shadow.items())
    assert any(not torch.equal(first.shadow[name], p) for name, p in uninterrupted.shadow.items())
