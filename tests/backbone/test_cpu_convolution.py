"""Convolutions as matrix products: same outputs and gradients as the convolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdtune.backbone import Pretrained, cpu_convolution
from sdtune.backbone.cpu_convolution import MatmulConv2d, use_matmul_convolutions


@pytest.fixture
def no_minimum_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution has enough weights to run as a matrix product."""
    monkeypatch.setattr(cpu_convolution, "_WEIGHTS", 1)


SHAPES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": 1},
    {"kernel_size": (1, 3), "padding": (0, 2), "stride": (1, 2)},
]


@pytest.mark.usefixtures("no_minimum_size")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_those_of_the_convolution(
    shape: dict[str, Any], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 5, **shape).double().to(memory_format=layout)
    model = nn.Sequential(nn.Conv2d(6, 5, **shape).double().to(memory_format=layout))
    model[0].load_state_dict(plain.state_dict())
    use_matmul_convolutions(model)
    assert type(model[0]) is MatmulConv2d
    x = torch.randn(2, 6, 7, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    expected, actual = plain(x), model(x)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (x, *plain.parameters()))
    (actual * weights).sum().backward()
    torch.testing.assert_close((x.grad, *(p.grad for p in model.parameters())), expected_gradients)
    for parameter in model.parameters():
        assert parameter.grad is not None
        has_layout = parameter.dim() == 1 or parameter.grad.is_contiguous(memory_format=layout)
        assert has_layout, "DDP buckets expect gradients with the strides of the parameters"


@pytest.mark.usefixtures("no_minimum_size")
def test_half_precision_error_is_no_larger_than_that_of_the_convolution() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last))
    model[0].load_state_dict(plain.state_dict())
    use_matmul_convolutions(model)
    x = torch.randn(1, 64, 8, 8).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(1, 64, 8, 8)

    def gradients(module: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = x.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = (module(inputs).to(dtype) * weights.to(dtype)).sum()
        return list(torch.autograd.grad(loss, (inputs, *module.parameters())))

    plain_gradients, product_gradients = gradients(plain, torch.bfloat16), gradients(model, torch.bfloat16)
    exact_gradients = gradients(plain.double(), torch.float64)
    for actual, plain_gradient, exact in zip(product_gradients, plain_gradients, exact_gradients, strict=True):
        assert (actual - exact).norm() <= 1.2 * (plain_gradient - exact).norm()


@pytest.mark.usefixtures("no_minimum_size")
def test_many_pixels_use_the_plain_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    use_matmul_convolutions(model)
    products: list[None] = []
    linear = nn.functional.linear
    monkeypatch.setattr(cpu_convolution.F, "linear", lambda *a: (products.append(None), linear(*a))[1])
    model(torch.randn(4, 3, 8, 8))
    assert len(products) == 1
    model(torch.randn(5, 3, 8, 8))
    assert len(products) == 1


@pytest.mark.usefixtures("no_minimum_size")
@pytest.mark.parametrize("shape", [{"groups": 3}, {"dilation": 2}, {"padding": "same"}, {"padding_mode": "reflect"}])
def test_unsupported_convolution_is_unchanged(shape: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, **shape))
    use_matmul_convolutions(model)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.usefixtures("no_minimum_size")
def test_unet_output_is_unchanged(tiny: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    sample, steps, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, *backbone.text_shapes["states"])
    with torch.no_grad():
        expected = backbone.denoiser(sample, steps, text).sample
        backbone.prepare_for_device(torch.device("cpu"))
        actual = backbone.denoiser(sample, steps, text).sample
    assert sum(type(module) is MatmulConv2d for module in backbone.denoiser.modules()) > 5
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
