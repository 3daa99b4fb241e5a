"""Attention processors: equal results, and which of them a model gets."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from sdtune.backbone import Pretrained
from sdtune.backbone.attention import PlainAttnProcessor, set_attention

CPU, OTHER = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("context", [None, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_output_and_gradients_equal_those_of_diffusers_processor(context: int | None, masked: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=32, cross_attention_dim=None if context is None else 24, heads=4, dim_head=8)
    x = torch.randn(2, 16, 32, requires_grad=True)
    text = None if context is None else torch.randn(2, context, 24)
    mask = torch.zeros(2, 1, context or 16).index_fill_(2, torch.tensor([1]), -1e4) if masked else None

    def results(processor: AttnProcessor2_0 | PlainAttnProcessor) -> tuple[Tensor, ...]:
        layer.set_processor(processor)
        out = layer(x, encoder_hidden_states=text, attention_mask=mask)
        return out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])

    for value, expected in zip(results(PlainAttnProcessor()), results(AttnProcessor2_0()), strict=True):
        assert torch.equal(value, expected)


def test_injected_attention_processors_are_kept(tiny: Path) -> None:
    class Injected(AttnProcessor2_0):
        """An attention processor such as an IP-Adapter injects."""

    backbone = Pretrained(str(tiny)).load()
    processors = backbone.denoiser.attn_processors
    injected = next(iter(processors))
    backbone.denoiser.set_attn_processor({**processors, injected: Injected()})
    for device, expected in ((CPU, AttnProcessor), (OTHER, PlainAttnProcessor), (CPU, AttnProcessor)):
        backbone.prepare_for_device(device)
        kinds = {name: type(processor) for name, processor in backbone.denoiser.attn_processors.items()}
        assert kinds.pop(injected) is Injected
        assert set(kinds.values()) == {expected}


def test_attention_of_the_vae_with_norm_and_residual_keeps_diffusers_processor(tiny: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    backbone.prepare_for_device(OTHER)
    assert {type(processor) for processor in backbone.vae.attn_processors.values()} == {AttnProcessor2_0}


def test_signature_is_not_derived_in_each_call() -> None:
    assert "__signature__" in vars(PlainAttnProcessor.__call__)


def test_attention_of_another_class_keeps_diffusers_processor() -> None:
    class Other(torch.nn.Module):
        """A model with a layer that is not diffusers' ``Attention``."""

        attn_processors: ClassVar[dict[str, object]] = {"layer.processor": AttnProcessor()}

        def set_attn_processor(self, processors: dict[str, object]) -> None:
            self.attn_processors = processors  # type: ignore[misc]

    model = Other()
    set_attention(model, sdpa=True)
    assert {type(processor) for processor in model.attn_processors.values()} == {AttnProcessor2_0}
