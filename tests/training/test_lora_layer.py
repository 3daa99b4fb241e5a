"""The faster LoRA layer computes what peft's own does, and leaves to peft what is more than a plain pair."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from sdtune.peft_compat import register_layers
from sdtune.training.lora_layer import Site

VARIANTS = {"plain": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}, "rslora": {"use_rslora": True}}


def layer(own: bool, **settings: bool) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **settings)
    if own:
        register_layers(config, {nn.Linear: Site})
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(5, 4)))
    rng = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.rand(parameter.shape, generator=rng)
    return model[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_pefts_layer(variant: str) -> None:
    ours, theirs = layer(True, **VARIANTS[variant]), layer(False, **VARIANTS[variant])
    assert type(ours) is Site
    assert type(theirs) is Linear
    x = torch.rand(3, 5, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x))

    def gradients(module: nn.Module) -> list[Tensor]:
        trained = [p for n, p in module.named_parameters() if "lora_" in n]
        return list(torch.autograd.grad(module(x).square().sum(), trained))

    torch.testing.assert_close(gradients(ours), gradients(theirs))
