"""No tensor is made on the CPU by accident: on the meta device a step or an image that mixes one in raises.

What a GPU would refuse, the meta device refuses too, and it is here. ``sdtune plan`` takes the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import Net
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
OWN = {
    "dreambooth": ["data.class_prompt=a photo of a dog"],
    "lora": [
        "method.targets=[cross_attention,self_attention,feed_forward,convolutions,text_encoder]",
        "objective=min_snr",
        "objective.offset_noise=0.1",
        "backbone.prediction_type=v_prediction",
    ],
    "full": ["method.parts=[unet,text_encoder,vae]"],
    "controlnet": ["method.unet=open", "data/control=canny"],
}


def adapter(method: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """``method`` after a step forward and back on the meta device, in bfloat16 as on a GPU."""
    kept: list[Adapter] = []
    measure = planning.measure

    def keep(model: Adapter, **settings: Any) -> Any:
        kept.append(model)
        return measure(model, **settings)

    monkeypatch.setattr("sdtune.planning.request.measure", keep)
    where = "backbone=sd15", f"backbone.path={tiny}", "data.cache_latents=false", "data.cache_text=false"
    settings = [f"method={method}", *where, *OWN.get(method, [])]
    count(plan_request(checked_plan(compose("plan", search_path(None), settings))))
    return kept[0]


class Solver:
    """A solver's tables lie on the CPU and its numbers are read there, on any device; so this one has none."""

    init_noise_sigma = 1.0

    def set_timesteps(self, steps: int, device: torch.device) -> None:
        self.timesteps = torch.empty(steps, dtype=torch.long, device=device)

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return latents

    def step(self, output: Tensor, timestep: Tensor, latents: Tensor) -> Any:
        return SimpleNamespace(prev_sample=latents - output)


def draw(model: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample under a map up to where the finished image would come to the CPU, which meta tensors cannot."""
    monkeypatch.setattr(sampling, "make_scheduler", lambda *_: Solver())

    def denoise(noisy: Tensor, timestep: Tensor, text: Tensor, maps: Sequence[Tensor]) -> Tensor:
        return model.denoise(noisy, timestep, text, {"control": maps[0]})

    request = Request("a fox", 0, (np.zeros((32, 32, 3), np.uint8),))
    with (
        autocast(torch.device("meta"), str(model.trainer.precision)),
        pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"),
    ):
        list(sampling.generate(model.backbone, [request], Sampling(steps=2), denoise))


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in ("lora", "controlnet") else pytest.mark.slow) for m in METHODS]
)
def test_a_step_and_a_image_stay_on_the_device(method: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapter(method, tiny, monkeypatch)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    draw(model, monkeypatch)


def test_a_masked_loss_and_a_net_beside_stay_on_the_device(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapter("controlnet", tiny, monkeypatch)
    batch = planning.meta_batch(model, 2, 32, cached_latents=False, cached_text=False)
    batch["mask"] = torch.empty(2, 1, 8, 8, device="meta")
    with autocast(torch.device("meta"), str(model.trainer.precision)):
        assert model.losses(batch).device.type == "meta"
        model.backbone.nets = (Net(model.controlnet, 0.5), Net(model.controlnet, 0.0))
        noisy, times = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
        text = model.encode_text(["a fox", ""])
        out = sampling.predict_with_controlnets(
            model.backbone, noisy, times, text, [batch["control"], batch["control"]]
        )
    assert out.device.type == "meta"


def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the backbone adds a tensor that was made on the CPU."""
    unet_inputs = Backbone.unet_inputs

    def wrong(self: Backbone, noisy: Tensor, *more: Any, **named: Any) -> dict[str, Any]:
        return unet_inputs(self, noisy + torch.zeros(noisy.shape), *more, **named)

    monkeypatch.setattr(Backbone, "unet_inputs", wrong)


def test_a_tensor_of_the_cpus_is_refused_in_a_step(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    careless(monkeypatch)
    with pytest.raises(RuntimeError, match="device"):
        adapter("textual_inversion", tiny, monkeypatch)


def test_a_tensor_of_the_cpus_is_refused_in_a_image(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapter("textual_inversion", tiny, monkeypatch)
    careless(monkeypatch)
    with pytest.raises(RuntimeError, match="device"):
        draw(model, monkeypatch)


def test_the_outline_is_on_the_meta_device(tiny: Path) -> None:
    assert MetaPretrained(str(tiny)).load().device.type == "meta"
