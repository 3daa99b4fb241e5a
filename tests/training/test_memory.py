"""What saves memory changes no number: gradient checkpointing, offloading; and the guard under a gradient scaler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from running import Spy, adamw, arguments, fit, folder_data, rows, train
from sdtune.backbone import Pretrained
from sdtune.methods import LoRA
from sdtune.training.nonfinite_guard import OVERFLOWS, Guard

WITH_TEXT = ("cross_attention", "text_encoder")


def test_checkpointing_gives_the_same_gradients(tiny: Path, images: Path) -> None:
    """Those of the text encoder too, which the reentrant kind loses."""
    seen = []
    for on in (False, True):
        model = LoRA(
            rank=2, targets=WITH_TEXT, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-2), gradient_checkpointing=on
        )
        spy = Spy()
        fit(model, folder_data(images), 2, [spy])
        assert model.backbone.unet.is_gradient_checkpointing is on
        assert model.backbone.text_encoder.is_gradient_checkpointing is on
        seen.append(spy.gradients[1])
    for name, gradient in seen[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, seen[1][name], rtol=1e-5, atol=1e-7)


class Whereabouts(Callback):
    """Which parts wait off the device while a step is made, and while validation runs."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.offloaded = {type(part).__name__ for part in pl_module.offloaded.parts}


@pytest.mark.parametrize(
    ("cached", "targets", "wanted"),
    [
        (True, ("cross_attention",), {"AutoencoderKL", "CLIPTextModel"}),
        (True, WITH_TEXT, {"AutoencoderKL"}),
        (False, ("cross_attention",), {"CLIPTextModel"}),
    ],
)
def test_only_what_is_cached_waits_elsewhere(
    tiny: Path, images: Path, cached: bool, targets: tuple[Any, ...], wanted: set[str]
) -> None:
    model = LoRA(rank=2, targets=targets, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3), offload=True)
    seen = Whereabouts()
    fit(model, folder_data(images, cache_latents=cached), 1, [seen])
    assert seen.offloaded == wanted


def test_the_switches_stand_in_the_hardware_group(tiny: Path, images: Path, tmp_path: Path) -> None:
    losses = []
    for value in ("true", "false"):
        run = tmp_path / value
        switches = [f"hardware.gradient_checkpointing={value}", f"hardware.offload={value}", "trainer.max_steps=2"]
        # With previews, for which everything comes back.
        own = [a for a in arguments(tiny, images, run, *switches) if a != "callbacks.samples=null"]
        assert train(*own, "callbacks.samples.sampling.steps=1", "callbacks.samples.seeds=[0]") == 0
        assert (run / "samples" / "before_after.png").is_file()
        losses.append([float(row["loss"]) for row in rows(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_overflow_under_a_scaler_is_its_to_pass_over() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.tensor([1.0, float("inf"), 1.0, 1.0])
    figures = Guard().clip(optimizer, [weight], 1.0, loss=torch.tensor(2.0), scaled=True)
    assert bool(figures["finite"])
    assert not torch.isfinite(weight.grad).all(), "the scaler must still see it"
    assert not bool(Guard().clip(optimizer, [weight], 1.0, loss=torch.tensor(float("nan")), scaled=True)["finite"])
    weight.grad = torch.tensor([1.0, float("inf"), 1.0, 1.0])
    assert not bool(Guard().clip(optimizer, [weight], 1.0, loss=torch.tensor(2.0), scaled=False)["finite"])
    assert not weight.grad.any()


@pytest.mark.parametrize("micro", [2, 1])
def test_a_full_device_names_what_this_run_can_do(
    micro: int,
    tiny: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LoRA, "training_step", full)
    own = ["data.batch_size=4", f"trainer.accumulate_grad_batches={4 // micro}"]
    assert train(*arguments(tiny, images, tmp_path / "run", *own)) == 1
    said = capsys.readouterr().err
    assert "out of memory on the device: give hardware=gpu_12gb," in said
    assert ("trainer.accumulate_grad_batches=4" in said) is (micro > 1)


def test_gradients_that_no_scale_makes_finite_end_the_run() -> None:
    weight, guard = torch.nn.Parameter(torch.ones(2)), Guard()
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def step(value: float) -> bool:
        weight.grad = torch.full((2,), value)
        return bool(guard.clip(optimizer, [weight], 1.0, loss=torch.tensor(1.0), scaled=True)["finite"])

    assert all(step(float("nan")) for _ in range(OVERFLOWS - 1))
    assert step(1.0), "one that is finite begins the count anew"
    assert all(step(float("inf")) for _ in range(OVERFLOWS - 1))
    assert not step(float("nan"))
