"""The sampling loop generates the same images as diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.errors import UserError
from sdtune.sampling.loop import Request, Sampling, can_sample, generate

REQUESTS = [Request("a red fox", 3), Request("two blue foxes", 4), Request("a red fox", 5)]


@pytest.fixture(scope="module")
def backbone(tiny: Path) -> Backbone:
    loaded = Pretrained(str(tiny)).load()
    loaded.prepare_for_device(torch.device("cpu"))
    return loaded


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def floats(
    backbone: Backbone, requests: Sequence[Request], settings: Sampling, patch: pytest.MonkeyPatch
) -> np.ndarray:
    """Generated images [B, H, W, 3] in [0, 1], before the conversion to uint8."""
    decoded: list[torch.Tensor] = []
    decode = Backbone.decode

    def spy(self: Backbone, latents: torch.Tensor) -> torch.Tensor:
        decoded.append(decode(self, latents))
        return decoded[-1]

    with patch.context() as inner:
        inner.setattr(Backbone, "decode", spy)
        images = np.stack(list(generate(backbone, requests, settings)))
    exact = torch.cat(decoded).permute(0, 2, 3, 1).numpy()
    assert np.abs(images / 255 - exact).max() <= 0.5 / 255 + 1e-6
    return exact


@pytest.mark.parametrize(
    ("settings", "scheduler"),
    [
        ({}, "DDIMScheduler"),
        ({"guidance": 1.0}, "DDIMScheduler"),
        ({"negative_prompt": "blurred, grey"}, "DDIMScheduler"),
        ({"sampler": "dpmpp_2m"}, "DPMSolverMultistepScheduler"),
        ({"sampler": "euler_ancestral"}, "EulerAncestralDiscreteScheduler"),
        ({"width": 48, "height": 24}, "DDIMScheduler"),
    ],
    ids=["guided", "unguided", "negative prompt", "dpmpp_2m", "euler_ancestral", "not square"],
)
def test_images_equal_those_of_diffusers(
    settings: dict[str, Any],
    scheduler: str,
    backbone: Backbone,
    pipe: StableDiffusionPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = Sampling(**{"steps": 4, "guidance": 5.0, **settings})
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    expected = pipe(
        [request.prompt for request in REQUESTS],
        negative_prompt=[sampling.negative_prompt] * 3,
        num_inference_steps=4,
        guidance_scale=sampling.guidance,
        width=sampling.width,
        height=sampling.height,
        generator=[torch.Generator().manual_seed(request.seed) for request in REQUESTS],
        output_type="np",
    ).images
    images = floats(backbone, REQUESTS, sampling, monkeypatch)
    assert images.shape == (3, sampling.height or 32, sampling.width or 32, 3)
    assert np.abs(images - expected).max() <= 1e-4
    assert np.abs(images[0] - images[2]).max() > 1e-2  # equal prompts, different seeds


def test_settings_change_the_image(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the comparison with diffusers would prove nothing."""
    variants = [
        Sampling(steps=4, guidance=5.0),
        Sampling(steps=4, guidance=1.0),
        Sampling(steps=4, guidance=5.0, negative_prompt="blurred, grey"),
        Sampling(steps=4, guidance=5.0, sampler="dpmpp_2m"),
        Sampling(steps=3, guidance=5.0),
    ]
    images = [floats(backbone, REQUESTS[:1], settings, monkeypatch) for settings in variants]
    for i, image in enumerate(images):
        assert all(np.abs(image - other).max() > 1e-3 for other in images[:i])


def test_image_does_not_depend_on_its_batch(backbone: Backbone) -> None:
    for sampler in (None, "euler_ancestral"):
        together = list(generate(backbone, REQUESTS, Sampling(steps=3, sampler=sampler, batch_size=3)))
        alone = list(generate(backbone, REQUESTS, Sampling(steps=3, sampler=sampler, batch_size=1)))
        for batched, single in zip(together, alone, strict=True):
            assert np.abs(batched.astype(int) - single).max() <= 1


@pytest.mark.parametrize("scheduler", ["FooScheduler", "DPMSolverSDEScheduler", "KarrasVeScheduler", "UNet2DModel", ""])
def test_scheduler_that_cannot_sample_needs_a_sampler(backbone: Backbone, scheduler: str) -> None:
    """DPMSolverSDEScheduler needs torchsde, which is not installed."""
    facts = replace(backbone.facts, scheduler=scheduler)
    message = rf"^sampling\.sampler: the scheduler of the backbone is {scheduler}.*; set sampling\.sampler=ddim"
    with pytest.raises(UserError, match=message):
        Sampling().check(facts)
    Sampling(sampler="ddim").check(facts)


def test_every_sampler_and_usual_scheduler_can_sample() -> None:
    for name in ("DDPMScheduler", "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler", "PNDMScheduler"):
        assert can_sample(name)


def test_width_that_is_not_a_multiple_of_the_vae_factor_is_refused(backbone: Backbone) -> None:
    with pytest.raises(
        UserError, match=r"^sampling\.width: 30 is not a multiple of 4, the downscaling factor of the VAE; set 32$"
    ):
        list(generate(backbone, REQUESTS, Sampling(width=30)))
