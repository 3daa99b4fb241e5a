"""Training steps and sampling create no tensor on the CPU by accident; on the meta device that raises, as on a GPU.

``sdtune plan`` runs the training step on the meta device.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import ControlNetWithStrength
from sdtune.backbone.families.unet_backbone import UNetBackbone
from sdtune.backbone.meta import MetaPretrained
from sdtune.commands.plan import checked_plan, plan_request
from sdtune.config.compose import compose, search_path
from sdtune.hardware.precision import autocast
from sdtune.methods.base import Adapter
from sdtune.paths import config_folder
from sdtune.planning import measure as planning
from sdtune.planning.request import count
from sdtune.sampling import loop as sampling
from sdtune.sampling.loop import Request, Sampling

METHODS = sorted(path.stem for path in (config_folder() / "method").glob("*.yaml"))
OVERRIDES = {
    "dreambooth": ["data.class_prompt=a photo of a dog"],
    "lora": [
        "method.targets=[cross_attention,self_attention,feed_forward,convolutions,text_encoder]",
        "objective=min_snr",
        "objective.offset_noise=0.1",
        "backbone.prediction_type=v_prediction",
    ],
    "full": ["method.parts=[denoiser,text_encoder,vae]"],
    "controlnet": ["method.denoiser=all", "data/control=canny"],
}


def adapter(method: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """Adapter of ``method`` after a forward and backward pass on the meta device, in bfloat16 as on a GPU."""
    adapters: list[Adapter] = []
    measure = planning.measure

    def record(model: Adapter, **settings: Any) -> Any:
        adapters.append(model)
        return measure(model, **settings)

    monkeypatch.setattr("sdtune.planning.request.measure", record)
    common = "backbone=sd15", f"backbone.path={tiny}", "data.cache_latents=false", "data.cache_text=false"
    settings = [f"method={method}", *common, *OVERRIDES.get(method, [])]
    count(plan_request(checked_plan(compose("plan", search_path(None), settings))))
    return adapters[0]


class Solver:
    """Fake scheduler; diffusers' schedulers keep their tables on the CPU and read numbers there, on any device."""

    init_noise_sigma = 1.0

    def set_timesteps(self, steps: int, device: torch.device) -> None:
        self.timesteps = torch.empty(steps, dtype=torch.long, device=device)

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return latents

    def step(self, output: Tensor, timestep: Tensor, latents: Tensor) -> Any:
        return SimpleNamespace(prev_sample=latents - output)


def generate(model: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample with a control map until the copy of the image to the CPU, which meta tensors do not support."""
    monkeypatch.setattr(sampling, "make_scheduler", lambda *_: Solver())

    request = Request("a fox", 0, {"control": np.zeros((32, 32, 3), np.uint8)})
    with (
        autocast(torch.device("meta"), str(model.trainer.precision)),
        pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"),
    ):
        list(sampling.generate(model.backbone, [request], Sampling(steps=2), model))


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in ("lora", "controlnet") else pytest.mark.slow) for m in METHODS]
)
def test_training_step_and_sampling_stay_on_the_device(
    method: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapter(method, tiny, monkeypatch)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    generate(model, monkeypatch)


def test_masked_loss_and_controlnets_stay_on_the_device(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapter("controlnet", tiny, monkeypatch)
    batch = planning.meta_batch(model, 2, 32, cached_latents=False, cached_text=False)
    batch["mask"] = torch.empty(2, 1, 8, 8, device="meta")
    with autocast(torch.device("meta"), str(model.trainer.precision)):
        assert model.losses(batch).device.type == "meta"
        model.backbone.conditioners = tuple(
            ControlNetWithStrength(name, model.controlnet, 0.5) for name in ("control", "control2")
        )
        noisy, times = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
        text = model.encode_text(["a fox", ""])
        maps = dict.fromkeys(("control", "control2"), batch["conditions"]["control"])
        predictor = sampling.WithConditioners(model.backbone)
        out = predictor.denoise(noisy, times, text, predictor.condition_encoder(maps))
    assert out.device.type == "meta"


def add_cpu_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the backbone add a CPU tensor to the UNet's input."""
    denoiser_inputs = UNetBackbone.denoiser_inputs

    def with_cpu_tensor(self: Backbone, noisy: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return denoiser_inputs(self, noisy + torch.zeros(noisy.shape), *args, **kwargs)

    monkeypatch.setattr(UNetBackbone, "denoiser_inputs", with_cpu_tensor)


def test_cpu_tensor_in_a_training_step_raises(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_cpu_tensor(monkeypatch)
    with pytest.raises(RuntimeError, match="device"):
        adapter("textual_inversion", tiny, monkeypatch)


def test_cpu_tensor_in_sampling_raises(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapter("textual_inversion", tiny, monkeypatch)
    add_cpu_tensor(monkeypatch)
    with pytest.raises(RuntimeError, match="device"):
        generate(model, monkeypatch)


def test_meta_pretrained_loads_on_the_meta_device(tiny: Path) -> None:
    assert MetaPretrained(str(tiny)).load().device.type == "meta"
