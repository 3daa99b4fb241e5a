"""A convolution as a product is that convolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdtune.backbone import Pretrained, cpu_convolution
from sdtune.backbone.cpu_convolution import FewPixels, as_products


@pytest.fixture
def all_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution has weights enough."""
    monkeypatch.setattr(cpu_convolution, "_WEIGHTS", 1)


SHAPES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": 1},
    {"kernel_size": (1, 3), "padding": (0, 2), "stride": (1, 2)},
]


@pytest.mark.usefixtures("all_are")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_the_convolutions(shape: dict[str, Any], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 5, **shape).double().to(memory_format=layout)
    model = nn.Sequential(nn.Conv2d(6, 5, **shape).double().to(memory_format=layout))
    model[0].load_state_dict(plain.state_dict())
    as_products(model)
    assert type(model[0]) is FewPixels
    x = torch.randn(2, 6, 7, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    one, other = plain(x), model(x)
    torch.testing.assert_close(other, one)
    weights = torch.randn_like(one)
    wanted = torch.autograd.grad((one * weights).sum(), (x, *plain.parameters()))
    (other * weights).sum().backward()
    torch.testing.assert_close((x.grad, *(p.grad for p in model.parameters())), wanted)
    for parameter in model.parameters():
        assert parameter.grad is not None
        same = parameter.dim() == 1 or parameter.grad.is_contiguous(memory_format=layout)
        assert same, "DDP's buckets take gradients by their strides"


@pytest.mark.usefixtures("all_are")
def test_in_half_precision_it_rounds_no_more_than_the_convolution() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last))
    model[0].load_state_dict(plain.state_dict())
    as_products(model)
    x = torch.randn(1, 64, 8, 8).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(1, 64, 8, 8)

    def gradients(module: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        own = x.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = (module(own).to(dtype) * weights.to(dtype)).sum()
        return list(torch.autograd.grad(loss, (own, *module.parameters())))

    theirs, ours = gradients(plain, torch.bfloat16), gradients(model, torch.bfloat16)
    exact = gradients(plain.double(), torch.float64)
    for one, other, wanted in zip(ours, theirs, exact, strict=True):
        assert (one - wanted).norm() <= 1.2 * (other - wanted).norm()


@pytest.mark.usefixtures("all_are")
def test_where_pixels_are_many_it_is_the_convolution_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    as_products(model)
    products: list[None] = []
    linear = nn.functional.linear
    monkeypatch.setattr(cpu_convolution.F, "linear", lambda *a: (products.append(None), linear(*a))[1])
    model(torch.randn(4, 3, 8, 8))
    assert len(products) == 1
    model(torch.randn(5, 3, 8, 8))
    assert len(products) == 1


@pytest.mark.usefixtures("all_are")
@pytest.mark.parametrize("shape", [{"groups": 3}, {"dilation": 2}, {"padding": "same"}, {"padding_mode": "reflect"}])
def test_what_is_not_plain_stays_as_it_is(shape: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, **shape))
    as_products(model)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.usefixtures("all_are")
def test_a_unet_is_what_it_was(tiny: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    sample, steps, states = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, *backbone.text_shape)
    with torch.no_grad():
        before = backbone.unet(sample, steps, states).sample
        backbone.prepare_for_device(torch.device("cpu"))
        after = backbone.unet(sample, steps, states).sample
    assert sum(type(module) is FewPixels for module in backbone.unet.modules()) > 5
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
