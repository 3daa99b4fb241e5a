"""Denoising loop with classifier-free guidance, used by previews, ``sdtune sample`` and evaluations."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Annotated, Any, Literal

import diffusers
import numpy as np
import torch
from annotated_types import Ge, Gt, Interval
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import sum_of
from sdtune.backbone.families import SD1, Facts
from sdtune.conditioning import Conditioning, concatenate, stack_rows
from sdtune.data.control.base import map_to_tensor
from sdtune.errors import UserError
from sdtune.hardware.out_of_memory import is_out_of_memory
from sdtune.objective.path import FlowPath

log = logging.getLogger("sdtune")

Sampler = Literal["ddim", "pndm", "euler", "euler_ancestral", "dpmpp_2m"]

_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
_FLOW_SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
"""Schedulers for flow models."""

Seed = Annotated[int, Interval(ge=0, lt=2**64)]
"""Seeds that torch's generators accept."""

Denoise = Callable[[Tensor, Tensor, Conditioning, Mapping[str, Tensor]], Tensor]
"""(noisy latents [B, C, h, w], timestep, conditioning, conditions by name) -> model output [B, C, h, w]."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    Args:
        steps: denoising steps.
        guidance: classifier-free guidance scale w of Ho & Salimans 2022 in diffusers' convention (1: none).
        negative_prompt: prompt of the unconditional branch of the guidance.
        sampler: name of the scheduler; None: that of the backbone.
        width, height: pixels; None: the native resolution of the backbone.
        batch_size: maximum number of images denoised in one batch; a GPU without enough memory gets fewer.
    """

    steps: Annotated[int, Ge(1)] = 30
    guidance: Annotated[float, Ge(0)] = SD1.guidance
    negative_prompt: str = ""
    sampler: Sampler | None = None
    width: Annotated[int, Gt(0)] | None = None
    height: Annotated[int, Gt(0)] | None = None
    batch_size: Annotated[int, Ge(1)] = 4

    def size(self, side: int) -> tuple[int, int]:
        """(width, height) in pixels for a backbone with native resolution ``side``."""
        return self.width or side, self.height or side

    def check(self, facts: Facts, key: str = "sampling") -> None:
        """Check the settings for a backbone with ``facts``, before its weights are read.

        Args:
            key: config key of these settings.

        Raises:
            UserError: width or height is not a multiple of the VAE's factor; the number of steps does not fit the
                scheduler; or no sampler is set and that of the backbone cannot be used.
        """
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None:
                facts.check_side(side, f"{key}.{name}")
        if self.steps > facts.train_timesteps:
            raise UserError(f"max {facts.train_timesteps} with this backbone, got {self.steps}", key=f"{key}.steps")
        is_flow = facts.prediction_type == "flow_prediction"
        if is_flow and self.sampler not in (None, *_FLOW_SCHEDULERS):
            raise UserError(
                f"{self.sampler} cannot sample a flow model",
                key=f"{key}.sampler",
                remedy=f"set {' or '.join(_FLOW_SCHEDULERS)}, or null",
            )
        scheduler = _SCHEDULERS[self.sampler] if self.sampler else facts.scheduler
        if scheduler == "PNDMScheduler" and self.steps < facts.min_steps:
            raise UserError(f"pndm needs at least {facts.min_steps} steps here, got {self.steps}", key=f"{key}.steps")
        if self.sampler is None and not can_sample(facts.scheduler):
            raise UserError(
                f"the scheduler of the backbone is {facts.scheduler or 'not named'}, which cannot be used here",
                key=f"{key}.sampler",
                remedy=f"set {key}.sampler={'euler' if is_flow else 'ddim'}",
            )


@dataclass(frozen=True)
class Request:
    """One image to generate.

    Args:
        conditions: inputs of modules beside the denoiser by name (:class:`~sdtune.backbone.controlnet.Conditioner`):
            control maps, uint8 [H, W, 3] in the size of the image. All requests of a batch have the same names.
    """

    prompt: str
    seed: int
    conditions: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)


_OTHER_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "SASolverScheduler", "FlowMatchEulerDiscreteScheduler")
"""Schedulers that the denoising loop can use and that diffusers does not list in KarrasDiffusionSchedulers."""


def can_sample(scheduler: str) -> bool:
    """Whether the denoising loop can use the diffusers class ``scheduler``; false if it needs a missing library."""
    is_known = scheduler in _OTHER_SCHEDULERS or scheduler in KarrasDiffusionSchedulers.__members__
    kind = getattr(diffusers, scheduler, None)
    # If a library is missing, diffusers has a placeholder class of this name, which is not a scheduler.
    return is_known and isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)


def sampler_of(facts: Facts) -> Sampler | None:
    """Sampler of images that are generated without settings: None, the one of the backbone, if it can be used."""
    if can_sample(facts.scheduler):
        return None
    return "euler" if facts.prediction_type == "flow_prediction" else "ddim"


def make_scheduler(backbone: Backbone, sampler: Sampler | None) -> diffusers.SchedulerMixin:
    """Scheduler ``sampler`` with the noise schedule of the backbone; None: the scheduler of the backbone.

    Raises:
        UserError: the noise schedule has zero terminal SNR, which ``sampler`` does not support.
    """
    config = dict(backbone.scheduler_config)
    if isinstance(backbone.path, FlowPath):
        flow_kind = getattr(diffusers, _FLOW_SCHEDULERS[sampler] if sampler else config["_class_name"])
        return flow_kind.from_config(_flow_config(config, backbone.path, flow_kind))
    kind = getattr(diffusers, _SCHEDULERS[sampler] if sampler else config["_class_name"])
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
        if sampler is not None:
            raise UserError(
                f"{sampler} does not support zero terminal SNR, which the backbone has",
                key="sampling.sampler",
                remedy="use ddim, euler or dpmpp_2m",
            )
        kind = diffusers.DDIMScheduler
    return kind.from_config(config)


def _flow_config(config: dict[str, Any], path: FlowPath, kind: type) -> dict[str, Any]:
    """Scheduler config for ``kind``; the schedulers of flow models name the shift differently."""
    multistep = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": path.shift}
    merged = {**config, "num_train_timesteps": path.steps, "shift": path.shift, **multistep}
    return {name: value for name, value in merged.items() if name in inspect.signature(kind).parameters}


def predict_with_conditions(
    backbone: Backbone,
    noisy: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    conditions: Mapping[str, Tensor],
) -> Tensor:
    """Prediction of the backbone, with what its conditioners compute from ``conditions``."""
    arguments = backbone.conditions(conditioning, noisy)
    added = [
        conditioner.added_inputs(backbone, noisy, timesteps, arguments, conditions[conditioner.name])
        for conditioner in backbone.conditioners
        if conditioner.name in conditions
    ]
    return backbone.predict(noisy, timesteps, conditioning, reduce(sum_of, added) if added else None)


@torch.no_grad()
def generate(
    backbone: Backbone, requests: Sequence[Request], settings: Sampling, denoise: Denoise | None = None
) -> Iterator[np.ndarray]:
    """Generate the images of ``requests``, in order.

    Except for rounding, an image depends only on its prompt, seed and settings, not on the other images of its batch:
    the initial latents come from a CPU generator with the seed of the request, as in diffusers with one generator per
    image.

    Args:
        denoise: denoising function of a method; None: :func:`predict_with_conditions`.

    Yields:
        uint8 [H, W, 3].

    Raises:
        UserError: width or height does not fit the VAE.
    """
    settings.check(backbone.facts)
    denoise = denoise or partial(predict_with_conditions, backbone)
    texts = _text_encoder(backbone, requests, settings)
    first, size = 0, settings.batch_size
    while first < len(requests):
        batch = requests[first : first + size]
        try:
            images = _batch(backbone, batch, settings, denoise, texts)
        except RuntimeError as error:
            if backbone.device.type == "cpu" or size == 1 or not is_out_of_memory(error):
                raise
            images = None
        if images is None:  # outside of the except clause, whose exception keeps the tensors of the failed batch
            size = (min(size, len(batch)) + 1) // 2
            log.info("out of memory: generating %d images at a time", size)
            getattr(torch, backbone.device.type).empty_cache()
            continue
        first += len(batch)
        yield from images


def _batch(
    backbone: Backbone, batch: Sequence[Request], settings: Sampling, denoise: Denoise, texts: TextEncoder
) -> np.ndarray:
    """Generate the images of one batch, uint8 [B, H, W, 3]."""
    device, facts = backbone.device, backbone.facts
    width, height = settings.size(facts.side)
    shape = (facts.latent_channels, height // facts.factor, width // facts.factor)
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in batch]
    scheduler = make_scheduler(backbone, settings.sampler)
    scheduler.set_timesteps(settings.steps, device=device)
    latents = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)  # Euler of flows has none
    conditioning = texts([request.prompt for request in batch])
    guided = settings.guidance != 1
    if guided:
        conditioning = concatenate([texts([settings.negative_prompt]).expand(len(batch)), conditioning])
    conditions = _conditions(batch, device, guided)
    assert all(value.shape[2:] == (height, width) for value in conditions.values())
    step_arguments = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_arguments["generator"] = generators
    for timestep in scheduler.timesteps:
        model_input = torch.cat([latents, latents]) if guided else latents
        if hasattr(scheduler, "scale_model_input"):
            model_input = scheduler.scale_model_input(model_input, timestep)
        output = denoise(model_input, timestep, conditioning, conditions).float()
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + settings.guidance * (conditional - unconditional)
        latents = scheduler.step(output, timestep, latents, **step_arguments).prev_sample
    images: np.ndarray = (backbone.decode(latents) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return images


def _conditions(batch: Sequence[Request], device: torch.device, guided: bool) -> dict[str, Tensor]:
    """Conditions of a batch by name, float32 [B, 3, H, W] in [0, 1]; twice, one after another, if ``guided``."""
    assert all(request.conditions.keys() == batch[0].conditions.keys() for request in batch)
    conditions = {
        name: torch.stack([map_to_tensor(request.conditions[name]) for request in batch]).to(device)
        for name in batch[0].conditions
    }
    return {name: torch.cat([value, value]) for name, value in conditions.items()} if guided else conditions


TextEncoder = Callable[[Sequence[str]], Conditioning]
"""Function from prompts to text embeddings."""


def _text_encoder(backbone: Backbone, requests: Sequence[Request], settings: Sampling) -> TextEncoder:
    """Encoder of the prompts of ``requests``.

    If the text encoders wait in main memory, all prompts are encoded now, and the encoders are moved back.
    """
    if all(encoder.device == backbone.device for encoder in backbone.encoders.values()):
        return backbone.encode_text
    encoders = list(backbone.trainable_encoders.values())
    prompts = list(dict.fromkeys([*(request.prompt for request in requests), settings.negative_prompt]))
    embeddings: dict[str, dict[str, Tensor]] = {}
    try:
        for encoder in encoders:
            encoder.to(backbone.device)
        with backbone.encoders_on_device():
            for first in range(0, len(prompts), settings.batch_size):
                part = prompts[first : first + settings.batch_size]
                embeddings |= zip(part, backbone.encode_text(part).rows(), strict=True)
    finally:
        for encoder in encoders:
            encoder.to("cpu")
    return lambda texts: stack_rows([embeddings[text] for text in texts])
