"""Choice of device and precision, and validation of the hardware config."""

from __future__ import annotations

import pytest
import torch

from sdtune.config import hardware
from sdtune.errors import UserError
from sdtune.hardware import devices, precision


def test_auto_accelerator_is_cuda_if_available_else_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (devices.accelerator("auto"), devices.device("auto")) == ("cpu", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (devices.accelerator("auto"), devices.device("auto")) == ("gpu", torch.device("cuda"))


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_emulated_bfloat16_is_not_chosen(native: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
    assert precision.precision("auto", "gpu") == expected
    assert precision.precision("32-true", "gpu") == "32-true"


@pytest.mark.parametrize(
    ("node", "key"),
    [
        ({"accelerator": "gqu"}, "accelerator"),
        ({"accelerator": "gpu"}, "accelerator"),
        ({"precision": "fp8"}, "precision"),
        ({"devices": 0}, "devices"),
        ({"devices": []}, "devices"),
        ({"num_nodes": 0}, "num_nodes"),
    ],
)
def test_invalid_or_unavailable_hardware_is_refused(node: dict, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"^hardware.{key}: "):
        hardware.check_hardware(node)
