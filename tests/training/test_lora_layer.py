"""The faster LoRA layer gives the outputs and gradients of peft's layer, also for variants such as DoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from method_cases import Case
from running import Spy, fit
from sdtune.peft_compat import register_layers
from sdtune.torch_compat import TorchDispatchMode
from sdtune.training.lora_layer import FusedLoRALinear, HalfLoRAConv2d, cast_pairs, drop_cast_pairs

VARIANTS = {"plain": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}, "rslora": {"use_rslora": True}}


def layer(use_site: bool, **settings: bool) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **settings)
    if use_site:
        register_layers(config, {nn.Linear: FusedLoRALinear})
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(5, 4)))
    rng = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.rand(parameter.shape, generator=rng)
    return model[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_equal_those_of_peft(variant: str) -> None:
    fused, reference = layer(True, **VARIANTS[variant]), layer(False, **VARIANTS[variant])
    assert type(fused) is FusedLoRALinear
    assert type(reference) is Linear
    x = torch.rand(3, 5, requires_grad=True)
    torch.testing.assert_close(fused(x), reference(x))

    def gradients(module: nn.Module) -> list[Tensor]:
        trained = [p for n, p in module.named_parameters() if "lora_" in n]
        return list(torch.autograd.grad(module(x).square().sum(), trained))

    torch.testing.assert_close(gradients(fused), gradients(reference))


# --- pairs cast to half precision


def half_layers() -> list[Any]:
    """A linear layer and a convolution in bfloat16, with float32 pairs."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"])
    register_layers(config, {nn.Linear: FusedLoRALinear, nn.Conv2d: HalfLoRAConv2d})
    frozen = nn.Sequential(nn.Linear(8, 4), nn.Conv2d(4, 6, 3, padding=1, stride=2)).bfloat16()
    model = inject_adapter_in_model(config, frozen)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.rand(parameter.shape)
    return list(model)


def output(layers: list[Any], x: Tensor) -> Tensor:
    hidden = layers[0](x).view(2, 5, 5, 4).permute(0, 3, 1, 2)
    result: Tensor = layers[1](hidden)
    return result


def test_cast_pairs_give_outputs_and_gradients_of_float32_pairs_within_rounding() -> None:
    layers, x = half_layers(), torch.rand(50, 8).bfloat16()
    pairs = [p for layer in layers for n, p in layer.named_parameters() if "lora_" in n]
    reference = output(layers, x)
    expected = torch.autograd.grad(reference.float().square().sum(), pairs)
    cast_pairs(layers, torch.bfloat16)
    assert all(matrix.dtype == torch.bfloat16 for layer in layers for matrix in layer.cast_pair)
    result = output(layers, x)
    assert result.dtype == torch.bfloat16
    found = torch.autograd.grad(result.float().square().sum(), pairs)
    torch.testing.assert_close(result.float(), reference.float(), rtol=0.05, atol=0.05)
    for gradient, other in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - other).norm() < 0.02 * other.norm()
    drop_cast_pairs(layers)
    assert all(layer.cast_pair is None for layer in layers)


def test_cast_of_all_pairs_is_one_kernel_and_one_in_backward() -> None:
    layers = half_layers()
    with CountCasts() as casts:
        cast_pairs(layers, torch.bfloat16)
        assert casts.count == 1
        sum(matrix.float().sum() for layer in layers for matrix in layer.cast_pair).backward()
    assert all(layer.lora_A["default"].weight.grad is not None for layer in layers)
    assert casts.count == 1 + 4 * 2 + 1  # the sums of this test cast each matrix, and its gradient


class CountCasts(TorchDispatchMode):
    """Counts casts between dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


class Autocast(Callback):
    """Records whether autocast is on in the UNet, and the dtype of its output."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen: set[tuple[bool, torch.dtype]] = set()

        def record(module: nn.Module, inputs: Any, out: Any) -> None:
            self.seen.add((torch.is_autocast_enabled("cpu"), out.sample.dtype))

        pl_module.backbone.denoiser.register_forward_hook(record)


@pytest.mark.parametrize(
    ("case", "is_frozen"),
    [
        (Case("lora"), True),
        (Case("textual_inversion"), True),
        (Case("controlnet"), True),
        (Case("controlnet", {"denoiser": "decoder"}), False),
        (Case("dreambooth"), False),
    ],
    ids=str,
)
def test_only_a_trained_unet_is_computed_under_autocast(case: Case, is_frozen: bool, tiny: Path, images: Path) -> None:
    spy, autocast = Spy(), Autocast()
    model = case.model(tiny)
    fit(model, case.data(tiny, images), 3, [spy, autocast], precision="bf16-mixed")
    assert autocast.seen == {(not is_frozen, torch.bfloat16)}
    assert all(gradient.dtype == torch.float32 for gradient in spy.gradients[-1].values())
    assert any(gradient.any() for gradient in spy.gradients[-1].values())
    fit(case.model(tiny), case.data(tiny, images), 1, [autocast], precision="32-true")
    assert autocast.seen == {(False, torch.float32)}


def test_gradients_without_autocast_are_near_those_of_float32(tiny: Path, images: Path) -> None:
    """Also with gradient checkpointing, which computes the layers again with the same cast pairs."""
    targets = ["cross_attention", "self_attention", "feed_forward", "convolutions", "text_encoder"]
    gradients = {}
    for precision, checkpointing in (("32-true", False), ("bf16-mixed", False), ("bf16-mixed", True)):
        case, spy = Case("lora", {"targets": targets}), Spy()
        model = case.model(tiny, lr=1e-4, gradient_checkpointing=checkpointing)
        fit(model, case.data(tiny, images), 3, [spy], precision=precision)
        gradients[precision, checkpointing] = torch.cat([g.flatten() for g in spy.gradients[-1].values()])
        assert not any(getattr(m, "cast_pair", None) for m in model.modules())
    exact = gradients["32-true", False]
    assert (gradients["bf16-mixed", False] - exact).norm() < 0.05 * exact.norm()
    torch.testing.assert_close(gradients["bf16-mixed", True], gradients["bf16-mixed", False])
