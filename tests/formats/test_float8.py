"""8-bit tensors of other programs' checkpoints."""

from __future__ import annotations

import pytest
import torch

from sdtune.errors import UserError
from sdtune.formats.float8 import without_float8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_tensors_become_float16_exactly(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    values = values[values.float().isfinite()]
    other = torch.ones(2, dtype=torch.bfloat16)
    converted = without_float8({"a.weight": values, "b": other})
    assert converted["a.weight"].dtype == torch.float16
    assert torch.equal(converted["a.weight"].float(), values.float())
    assert converted["b"] is other


def test_scales_are_multiplied_out():
    weight, plain = torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn), torch.ones(1).to(torch.float8_e4m3fn)
    tensors = {
        "x.scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn),
        "x.a.weight": weight,
        "x.a.scale_weight": torch.tensor(1e-6),
        "x.a.scale_input": torch.tensor(3.0),
        "x.a.bias": torch.ones(1),
        "x.b.weight": plain,
    }
    converted = without_float8(tensors)
    assert converted.keys() == {"x.a.weight", "x.a.bias", "x.b.weight"}
    assert converted["x.a.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(converted["x.a.weight"].float(), torch.tensor([[1e-6, -448e-6]]), rtol=4e-3, atol=0)
    assert converted["x.b.weight"].item() == 1


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": torch.ones(1), "a.comfy_quant": torch.ones(1)}, r"does not read \(a\.comfy_quant\)"),
        ({"a.weight": torch.ones(1), "a.weight_scale": torch.ones(1)}, r"does not read \(a\.weight_scale\)"),
        ({"a.scale_weight": torch.ones(1)}, r"has a\.scale_weight, which is not the scale of an fp8 tensor a\.weight"),
        ({"a.weight": torch.ones(2), "a.scale_weight": torch.ones(1)}, "not the scale of an fp8 tensor"),
        ({"a.weight": torch.ones(2).to(torch.float8_e5m2), "a.scale_weight": torch.ones(2)}, "not the scale"),
    ],
)
def test_unknown_scales_are_refused_in_one_line(tensors, message):
    with pytest.raises(UserError, match=message) as caught:
        without_float8(tensors)
    assert "\n" not in str(caught.value)
