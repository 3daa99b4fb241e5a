"""Choice of device and precision, and validation of the hardware config."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

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


def test_auto_accelerator_is_apples_gpu_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    assert (devices.accelerator("auto"), devices.device("auto")) == ("mps", torch.device("mps"))
    assert precision.precision("auto", "auto") == precision.precision("auto", "mps") == "32-true"


class Driver:
    """CUDA driver of a GPU of compute capability ``major``; ``error``: the result of cuInit."""

    def __init__(self, major: int, error: int = 0) -> None:
        self._major, self._error = major, error

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._error

    def cuDeviceGet(self, gpu: Any, ordinal: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, gpu: Any) -> int:  # noqa: N802
        assert attribute == 75
        value._obj.value = self._major
        return 0


@pytest.mark.parametrize(("major", "expected"), [(7, "16-mixed"), (8, "bf16-mixed"), (9, "bf16-mixed")])
def test_precision_of_an_nvidia_gpu_is_found_without_a_cuda_context(
    major: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise AssertionError("this creates a CUDA context")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver(major))
    assert precision.precision("auto", "gpu") == expected
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver(major, error=100))
    assert devices.compute_capability() is None


def test_sampling_uses_the_first_listed_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.first_device({"accelerator": "gpu", "devices": 1}) == torch.device("cuda", 0)
    assert hardware.first_device({"accelerator": "gpu", "devices": [1]}) == torch.device("cuda", 1)
    assert hardware.first_device({"accelerator": "cpu", "devices": 1}) == torch.device("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_emulated_bfloat16_is_not_chosen(native: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "compute_capability", lambda: None)
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
        ({"devices": True}, "devices"),
        ({"devices": "all"}, "devices"),
        ({"devices": ["x"]}, "devices"),
        ({"accelerator": "mps"}, "accelerator"),
        ({"accelerator": "cpu", "devices": [1]}, "devices"),
        ({"devices": "0,1"}, "devices"),
        ({"num_nodes": 0}, "num_nodes"),
    ],
)
def test_invalid_or_unavailable_hardware_is_refused(node: dict, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"^hardware.{key}: "):
        hardware.check_hardware(node)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([2], "no GPU with index 2; use indices below 2, each once"),
        ("0,5", "no GPU with index 5"),
        ([0, 0], r"\[0, 0\] has an index twice; use indices below 2, each once"),
        (4, "4 GPUs are set, this machine has 2; set a smaller number"),
    ],
)
def test_missing_gpus_are_refused(devices: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=rf"^hardware\.devices: {message}"):
        hardware.check_hardware({"accelerator": "gpu", "devices": devices})
    for present in (1, 2, [1], "0,1", "auto", -1):
        hardware.check_hardware({"accelerator": "gpu", "devices": present})


@pytest.mark.parametrize(("devices", "is_valid"), [(1, True), ([0], True), ("auto", True), (2, False), ([1], False)])
def test_mps_is_one_device(devices: object, is_valid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with nullcontext() if is_valid else pytest.raises(UserError, match=r"^hardware\.devices: "):
        hardware.check_hardware({"accelerator": "mps", "devices": devices})
