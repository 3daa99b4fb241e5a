"""Denoising loop with classifier-free guidance, used by previews, ``sdtune sample`` and evaluations."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Annotated, Any, Literal, Protocol

import diffusers
import numpy as np
import torch
from annotated_types import Ge, Gt, Interval
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import ConditionEncoder, sum_of
from sdtune.backbone.families import SD1, Facts
from sdtune.conditioning import Conditioning, concatenate, stack_rows
from sdtune.data.control.base import map_to_tensor
from sdtune.errors import UserError
from sdtune.hardware.out_of_memory import is_out_of_memory
from sdtune.objective.path import FlowPath, ProbabilityPath

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


class Predictor(Protocol):
    """Predicts in each step of sampling: a backbone with its conditioners, or a method that is trained."""

    @property
    def condition_encoder(self) -> ConditionEncoder | None:
        """Converts the conditions of an image once, before the steps; None: they are used as they are."""

    def denoise(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """Model output [B, C, h, w] for noisy latents [B, C, h, w]."""


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
        skip_guidance_layers: numbers of the transformer's blocks that are skipped for skip-layer guidance; None: none.
            From 1 % to 20 % of the steps, each step adds the difference to a prediction without these blocks
            (StableDiffusion3Pipeline in diffusers; Stability AI recommends 7, 8, 9 for SD 3.5 medium).
        skip_layer_guidance_scale: factor on this difference.
    """

    steps: Annotated[int, Ge(1)] = 30
    guidance: Annotated[float, Ge(0)] = SD1.guidance
    negative_prompt: str = ""
    sampler: Sampler | None = None
    width: Annotated[int, Gt(0)] | None = None
    height: Annotated[int, Gt(0)] | None = None
    batch_size: Annotated[int, Ge(1)] = 4
    skip_guidance_layers: Sequence[Annotated[int, Ge(0)]] | None = None
    skip_layer_guidance_scale: Annotated[float, Gt(0)] = 2.8

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
        self._check_skipped(facts, key)
        scheduler = _SCHEDULERS[self.sampler] if self.sampler else facts.scheduler
        if scheduler == "PNDMScheduler" and self.steps < facts.min_steps:
            raise UserError(f"pndm needs at least {facts.min_steps} steps here, got {self.steps}", key=f"{key}.steps")
        if self.sampler is None and not can_sample(facts.scheduler):
            raise UserError(
                f"the scheduler of the backbone is {facts.scheduler or 'not named'}, which cannot be used here",
                key=f"{key}.sampler",
                remedy=f"set {key}.sampler={'euler' if is_flow else 'ddim'}",
            )

    def _check_skipped(self, facts: Facts, key: str) -> None:
        if not self.skip_guidance_layers:
            return
        if not facts.blocks:
            raise UserError(
                f"{facts.family.title} has no transformer whose blocks could be skipped",
                key=f"{key}.skip_guidance_layers",
                remedy="set null",
            )
        if max(self.skip_guidance_layers) >= facts.blocks:
            raise UserError(
                f"{list(self.skip_guidance_layers)}, but the transformer has {facts.blocks} blocks",
                key=f"{key}.skip_guidance_layers",
                remedy=f"set numbers from 0 to {facts.blocks - 1}",
            )
        if self.guidance == 1:
            raise UserError(
                "is part of classifier-free guidance, which a guidance of 1 turns off",
                key=f"{key}.skip_guidance_layers",
                remedy=f"set {key}.guidance to more than 1, or skip_guidance_layers to null",
            )

    def skips_layers(self, step: int) -> bool:
        """Whether step number ``step`` has skip-layer guidance."""
        return bool(self.skip_guidance_layers) and 0.01 * self.steps < step < 0.2 * self.steps


@dataclass(frozen=True)
class Request:
    """One image to generate.

    Args:
        conditions: inputs of modules beside the denoiser by name (:class:`~sdtune.backbone.controlnet.Conditioner`):
            images, uint8 [H, W, 3]; control maps have the size of the image. All requests of a batch have the same
            names.
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


@dataclass(frozen=True)
class WithConditioners:
    """A :class:`Predictor`: the backbone, with what its conditioners compute from the conditions."""

    backbone: Backbone

    @property
    def condition_encoder(self) -> ConditionEncoder | None:
        return self._encode

    def _encode(self, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        conditioners = {conditioner.name: conditioner for conditioner in self.backbone.conditioners}
        return {
            name: conditioners[name].encode(self.backbone, condition)
            for name, condition in conditions.items()
            if name in conditioners
        }

    def denoise(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        backbone = self.backbone
        arguments = backbone.conditioning_arguments(conditioning, noisy)
        added = [
            conditioner.added_inputs(backbone, noisy, timesteps, arguments, conditions[conditioner.name])
            for conditioner in backbone.conditioners
            if conditioner.name in conditions
        ]
        return backbone.predict(noisy, timesteps, conditioning, reduce(sum_of, added) if added else None)


@torch.no_grad()
def generate(
    backbone: Backbone, requests: Sequence[Request], settings: Sampling, predictor: Predictor | None = None
) -> Iterator[np.ndarray]:
    """Generate the images of ``requests``, in order.

    Except for rounding, an image depends only on its prompt, seed and settings, not on the other images of its batch:
    the initial latents come from a CPU generator with the seed of the request, as in diffusers with one generator per
    image.

    Args:
        predictor: a method that is trained; None: the backbone with its conditioners.

    Yields:
        uint8 [H, W, 3].

    Raises:
        UserError: width or height does not fit the VAE.
    """
    settings.check(backbone.facts)
    predictor = predictor or WithConditioners(backbone)
    texts = _text_encoder(backbone, requests, settings)
    first, size = 0, settings.batch_size
    while first < len(requests):
        batch = requests[first : first + size]
        try:
            images = _batch(backbone, batch, settings, predictor, texts)
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
    backbone: Backbone, batch: Sequence[Request], settings: Sampling, predictor: Predictor, texts: TextEncoder
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
    text = conditioning = texts([request.prompt for request in batch])
    given, encode = _conditions(batch, device), predictor.condition_encoder
    maps = conditions = given if encode is None else encode(given)
    guided = settings.guidance != 1
    if guided:
        conditioning = concatenate([texts([settings.negative_prompt]).expand(len(batch)), text])
        conditions = {name: torch.cat([value, value]) for name, value in maps.items()}
    step_arguments = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_arguments["generator"] = generators
    for step, timestep in enumerate(_timesteps(scheduler, backbone.path)):
        model_input = torch.cat([latents, latents]) if guided else latents
        if hasattr(scheduler, "scale_model_input"):
            model_input = scheduler.scale_model_input(model_input, timestep)
        output = predictor.denoise(model_input, timestep, conditioning, conditions).float()
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + settings.guidance * (conditional - unconditional)
            if settings.skips_layers(step):
                with _layers_skipped(backbone, settings):
                    skipped = predictor.denoise(model_input[: len(batch)], timestep, text, maps).float()
                output = output + settings.skip_layer_guidance_scale * (conditional - skipped)
        latents = scheduler.step(output, timestep, latents, **step_arguments).prev_sample
    images: np.ndarray = (backbone.decode(latents) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return images


def _timesteps(scheduler: Any, path: ProbabilityPath) -> Tensor:
    """Timesteps of the denoiser; exact for a flow, whose multistep schedulers round them to whole numbers."""
    timesteps: Tensor = scheduler.timesteps
    if not isinstance(path, FlowPath) or timesteps.is_floating_point():
        return timesteps
    scheduler.set_begin_index(0)  # it would look for the first timestep among the rounded ones
    return path.timesteps(scheduler.sigmas[: len(timesteps)]).to(timesteps.device)


@contextmanager
def _layers_skipped(backbone: Backbone, settings: Sampling) -> Iterator[None]:
    backbone.skipped_layers = tuple(settings.skip_guidance_layers or ())
    try:
        yield
    finally:
        backbone.skipped_layers = ()


def _conditions(batch: Sequence[Request], device: torch.device) -> dict[str, Tensor]:
    """Conditions of a batch by name, float32 [B, 3, H, W] in [0, 1]."""
    assert all(request.conditions.keys() == batch[0].conditions.keys() for request in batch)
    return {
        name: torch.stack([map_to_tensor(request.conditions[name]) for request in batch]).to(device)
        for name in batch[0].conditions
    }


TextEncoder = Callable[[Sequence[str]], Conditioning]
"""Function from prompts to text embeddings."""


def _text_encoder(backbone: Backbone, requests: Sequence[Request], settings: Sampling) -> TextEncoder:
    """Encoder of the prompts of ``requests``.

    If the text encoders wait in main memory, all prompts are encoded now, and the encoders are moved back.
    """
    if all(encoder.device == backbone.device for encoder in backbone.encoders.values()):
        return backbone.encode_text
    encoders = {encoder: encoder.device for encoder in backbone.trainable_encoders.values()}
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
        for encoder, device in encoders.items():
            encoder.to(device)
    return lambda texts: stack_rows([embeddings[text] for text in texts])
