"""Batches of generated images on a GPU whose memory is too small for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdtune.backbone import Pretrained
from sdtune.sampling import loop
from sdtune.sampling.loop import Request, Sampling, generate


@pytest.mark.parametrize(
    ("fitting", "sizes"), [(8, [5]), (3, [5, 3, 2]), (2, [5, 3, 2, 2, 1]), (1, [5, 3, 2, 1, 1, 1, 1, 1])]
)
def test_batch_is_halved_until_it_fits(
    fitting: int, sizes: list[int], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def batch(_: Any, requests: list[Request], *__: Any) -> np.ndarray:
        tried.append(len(requests))
        if len(requests) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return np.array([request.seed for request in requests])

    monkeypatch.setattr(loop, "_batch", batch)
    monkeypatch.setattr(loop, "_text_encoder", lambda *_: None)
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), facts=Pretrained(str(tiny)).facts)
    requests = [Request("a fox", seed) for seed in range(5)]
    assert list(generate(gpu, requests, Sampling(batch_size=8))) == list(range(5))
    assert tried == sizes


@pytest.mark.parametrize(
    ("device", "error"),
    [("cuda", RuntimeError("another error")), ("cpu", torch.OutOfMemoryError("out of memory"))],
)
def test_other_errors_pass_through(device: str, error: Exception, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(*_: Any) -> np.ndarray:
        raise error

    monkeypatch.setattr(loop, "_batch", batch)
    monkeypatch.setattr(loop, "_text_encoder", lambda *_: None)
    backbone: Any = SimpleNamespace(device=torch.device(device), facts=Pretrained(str(tiny)).facts)
    with pytest.raises(RuntimeError, match=str(error)):
        list(generate(backbone, [Request("a fox", 0), Request("a fox", 1)], Sampling()))
