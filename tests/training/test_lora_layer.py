"""The faster LoRA layer gives the outputs and gradients of peft's layer, also for variants such as DoRA."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from sdtune.peft_compat import register_layers
from sdtune.training.lora_layer import FusedLoRALinear

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
