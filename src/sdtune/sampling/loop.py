"""The sampling loop of previews, ``sdtune sample`` and the evaluations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Annotated, Literal

import diffusers
import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import Residuals, residuals
from sdtune.backbone.families import GUIDANCE
from sdtune.data.control.base import as_map
from sdtune.errors import UserError

Sampler = Literal["ddim", "pndm", "euler", "euler_ancestral", "dpmpp_2m"]

_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}

Denoise = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor]], Tensor]
"""(noisy [B, C, h, w], timestep, text [B, L, D], control maps [B, 3, H, W] one a net) -> the UNet's output."""


@dataclass(frozen=True)
class Sampling:
    """How images are made.

    Args:
        steps: denoising steps.
        guidance: classifier-free guidance scale w of Ho & Salimans 2022 in diffusers' convention (1: none).
        negative_prompt: what guidance leads away from.
        sampler: the solver; the backbone's own if None.
        width, height: pixels; the backbone's own side if None.
        batch_size: images denoised at once.
    """

    steps: Annotated[int, Ge(1)] = 30
    guidance: Annotated[float, Ge(0)] = GUIDANCE["sd1"]
    negative_prompt: str = ""
    sampler: Sampler | None = None
    width: Annotated[int, Gt(0)] | None = None
    height: Annotated[int, Gt(0)] | None = None
    batch_size: Annotated[int, Ge(1)] = 4

    def size(self, side: int) -> tuple[int, int]:
        """(width, height) in pixels with a backbone of ``side``."""
        return self.width or side, self.height or side

    def check(self, factor: int) -> None:
        """UserError where a side does not fit a VAE that shrinks by ``factor``."""
        for key, side in (("width", self.width), ("height", self.height)):
            if side is not None and side % factor:
                raise UserError(f"{side} is not a multiple of {factor}, the VAE's factor", key=f"sampling.{key}")


@dataclass(frozen=True)
class Request:
    """One image wanted; ``maps`` are its control maps, uint8 [H, W, 3] of the image's size, one a net."""

    prompt: str
    seed: int
    maps: tuple[np.ndarray, ...] = field(default=(), compare=False)


def make_scheduler(backbone: Backbone, sampler: Sampler | None) -> diffusers.SchedulerMixin:
    """The solver over the backbone's own noise schedule."""
    config = dict(backbone.scheduler_config)
    kind = getattr(diffusers, _SCHEDULERS[sampler] if sampler else config["_class_name"])
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
        if sampler is not None:
            raise UserError(
                f"{sampler} cannot begin at pure noise; ddim, euler and dpmpp_2m can", key="sampling.sampler"
            )
        kind = diffusers.DDIMScheduler
    return kind.from_config(config)


def predict_with_controlnets(
    backbone: Backbone, noisy: Tensor, timesteps: Tensor, text: Tensor, maps: Sequence[Tensor]
) -> Tensor:
    """The backbone's prediction under its ``nets``, with one map for each; plainly without either.

    Args:
        maps: float32 [B, 3, H, W] in [0, 1].
    """
    pairs = zip(backbone.nets, maps, strict=True) if backbone.nets and maps else ()
    # At strength 0 a net is not asked: the base then costs what it costs.
    conditions = backbone.conditions(text, noisy, None)
    added = [residuals(n.model, noisy, timesteps, conditions, own, n.strength) for n, own in pairs if n.strength]
    return backbone.predict(noisy, timesteps, text, reduce(Residuals.__add__, added) if added else None)


@torch.no_grad()
def generate(
    backbone: Backbone, requests: Sequence[Request], settings: Sampling, denoise: Denoise | None = None
) -> Iterator[np.ndarray]:
    """Images uint8 [H, W, 3], one a request, in order.

    An image depends on its own prompt, seed and settings alone, not on its neighbours in the batch: initial latents
    come from a CPU generator with the request's seed, as in diffusers with one generator an image.

    Args:
        denoise: the method's own where it has one; the backbone's otherwise.
    """
    settings.check(backbone.facts.factor)
    denoise = denoise or partial(predict_with_controlnets, backbone)
    device, facts = backbone.device, backbone.facts
    width, height = settings.size(facts.side)
    shape = (facts.latent_channels, height // facts.factor, width // facts.factor)
    for first in range(0, len(requests), settings.batch_size):
        batch = requests[first : first + settings.batch_size]
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in batch]
        scheduler = make_scheduler(backbone, settings.sampler)
        scheduler.set_timesteps(settings.steps, device=device)
        latents = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        latents = latents * scheduler.init_noise_sigma
        text = backbone.encode_text([request.prompt for request in batch])
        guided = settings.guidance != 1
        if guided:
            empty = backbone.encode_text([settings.negative_prompt])
            text = torch.cat([empty.expand(len(batch), -1, -1), text])
        maps = [
            torch.stack([as_map(pixels) for pixels in each]).to(device)
            for each in zip(*(request.maps for request in batch), strict=True)
        ]
        assert all(each.shape[2:] == (height, width) for each in maps)
        maps = [torch.cat([m, m]) for m in maps] if guided else maps
        extra = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = generators
        for timestep in scheduler.timesteps:
            doubled = torch.cat([latents, latents]) if guided else latents
            output = denoise(scheduler.scale_model_input(doubled, timestep), timestep, text, maps).float()
            if guided:
                without, with_text = output.chunk(2)
                output = without + settings.guidance * (with_text - without)
            latents = scheduler.step(output, timestep, latents, **extra).prev_sample
        images = backbone.decode(latents)
        yield from (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
