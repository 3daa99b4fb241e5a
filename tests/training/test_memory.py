"""Gradient checkpointing, CPU offload, out-of-memory errors, and gradient overflow under a gradient scaler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from running import Spy, adamw, arguments, fit, folder_data, rows, train
from sdtune.backbone import Pretrained
from sdtune.methods import LoRA
from sdtune.training.nonfinite_guard import MAX_CONSECUTIVE_OVERFLOWS, NonfiniteGuard

WITH_TEXT_ENCODER = ("cross_attention", "text_encoder")


def test_gradient_checkpointing_gives_the_same_gradients(tiny: Path, images: Path) -> None:
    """Also for the text encoder, which gets no gradients with reentrant checkpointing."""
    gradients = []
    for enabled in (False, True):
        model = LoRA(
            rank=2,
            targets=WITH_TEXT_ENCODER,
            backbone=Pretrained(str(tiny)),
            optimizer=adamw(1e-2),
            gradient_checkpointing=enabled,
        )
        spy = Spy()
        fit(model, folder_data(images), 2, [spy])
        assert model.backbone.denoiser.is_gradient_checkpointing is enabled
        assert model.backbone.text_encoder.is_gradient_checkpointing is enabled
        gradients.append(spy.gradients[1])
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


class RecordOffloaded(Callback):
    """Records the class names of the offloaded models in a training step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        offload = pl_module.cpu_offload
        self.cpu_offload = {type(part).__name__ for part in (*offload.decoder, *offload.encoders)}


@pytest.mark.parametrize(
    ("cached", "targets", "expected"),
    [
        (True, ("cross_attention",), {"AutoencoderKL", "CLIPTextModel"}),
        (True, WITH_TEXT_ENCODER, {"AutoencoderKL"}),
        (False, ("cross_attention",), {"CLIPTextModel"}),
    ],
)
def test_only_models_with_cached_outputs_are_offloaded(
    tiny: Path, images: Path, cached: bool, targets: tuple[Any, ...], expected: set[str]
) -> None:
    model = LoRA(rank=2, targets=targets, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3), offload=True)
    recorded = RecordOffloaded()
    fit(model, folder_data(images, cache_latents=cached), 1, [recorded])
    assert recorded.cpu_offload == expected


def test_memory_settings_of_the_hardware_group_do_not_change_the_losses(
    tiny: Path, images: Path, tmp_path: Path
) -> None:
    losses = []
    for value in ("true", "false"):
        run = tmp_path / value
        switches = [f"hardware.gradient_checkpointing={value}", f"hardware.offload={value}", "trainer.max_steps=2"]
        # With previews, which need the offloaded models on the device.
        overrides = [a for a in arguments(tiny, images, run, *switches) if a != "callbacks.samples=null"]
        assert train(*overrides, "callbacks.samples.sampling.steps=1", "callbacks.samples.seeds=[0]") == 0
        assert (run / "samples" / "before_after.png").is_file()
        losses.append([float(row["loss"]) for row in rows(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_overflow_under_a_gradient_scaler_is_not_a_failure() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.tensor([1.0, float("inf"), 1.0, 1.0])
    metrics = NonfiniteGuard().clip(optimizer, [weight], 1.0, loss=torch.tensor(2.0), scaled=True)
    assert bool(metrics["finite"])
    assert not torch.isfinite(weight.grad).all(), "the gradient scaler must still find the overflow"
    assert not bool(
        NonfiniteGuard().clip(optimizer, [weight], 1.0, loss=torch.tensor(float("nan")), scaled=True)["finite"]
    )
    weight.grad = torch.tensor([1.0, float("inf"), 1.0, 1.0])
    assert not bool(NonfiniteGuard().clip(optimizer, [weight], 1.0, loss=torch.tensor(2.0), scaled=False)["finite"])
    assert not weight.grad.any()


@pytest.mark.parametrize("micro_batch", [2, 1])
def test_out_of_memory_error_suggests_settings_that_save_memory(
    micro_batch: int,
    tiny: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raise_out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LoRA, "training_step", raise_out_of_memory)
    overrides = ["data.batch_size=4", f"trainer.accumulate_grad_batches={4 // micro_batch}"]
    assert train(*arguments(tiny, images, tmp_path / "run", *overrides)) == 1
    stderr = capsys.readouterr().err
    assert "out of memory on the device: set hardware=gpu_12gb," in stderr
    assert ("trainer.accumulate_grad_batches=4" in stderr) is (micro_batch > 1)


def test_too_many_consecutive_overflows_are_a_failure() -> None:
    weight, guard = torch.nn.Parameter(torch.ones(2)), NonfiniteGuard()
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def step(value: float) -> bool:
        weight.grad = torch.full((2,), value)
        return bool(guard.clip(optimizer, [weight], 1.0, loss=torch.tensor(1.0), scaled=True)["finite"])

    assert all(step(float("nan")) for _ in range(MAX_CONSECUTIVE_OVERFLOWS - 1))
    assert step(1.0), "a finite step resets the count"
    assert all(step(float("inf")) for _ in range(MAX_CONSECUTIVE_OVERFLOWS - 1))
    assert not step(float("nan"))
