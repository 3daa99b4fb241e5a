"""A plan request: a method with a trainer on the meta device, and its costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytorch_lightning as pl
import torch

from sdtune.methods.base import Adapter
from sdtune.planning.measure import TrainingCosts, measure
from sdtune.training.caching import drawn_at_once


@dataclass(frozen=True)
class PlanRequest:
    """One method's settings, checked, of which the costs are to be counted.

    Attributes:
        make_adapter: gives the method over a backbone on the meta device, not yet built.
        micro_batch: samples that one process sees at once.
        pairs: whether each sample is two images, the subject's and one of its class.
        side: of the square images, in pixels.
        accumulation: micro-batches per step.
        precision: Lightning's, decided.
        gpu: whether a GPU is planned for, or a CPU.
        gradient_checkpointing: whether activations are computed again in backward.
        cache_latents, cache_text: whether the data keeps what frozen encoders make.
        average: whether an average of the weights is kept.
        previews: images drawn at once; 0 for none.
        draws_class: whether the model draws images of the class before training.
    """

    make_adapter: Callable[[], Adapter]
    micro_batch: int
    pairs: bool
    side: int
    accumulation: int
    precision: str
    gpu: bool
    gradient_checkpointing: bool
    cache_latents: bool
    cache_text: bool
    average: bool
    previews: int
    draws_class: bool


def outlined(request: PlanRequest) -> Adapter:
    """The method on the meta device, with a trainer attached."""
    adapter = request.make_adapter()
    with torch.device("meta"):
        adapter.configure_model()
    adapter.trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision=request.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=request.accumulation,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    adapter.to("meta", torch.float64 if request.precision == "64-true" else torch.float32)
    adapter.backbone.cast_frozen(request.precision)
    return adapter


def count(request: PlanRequest, previews: int | None = None) -> TrainingCosts:
    """Build the method on the meta device and measure it; ``previews`` are drawn at once, the request's if None."""
    return measure(
        outlined(request),
        count=request.micro_batch,
        pairs=request.pairs,
        side=request.side,
        gpu=request.gpu,
        cache_latents=request.cache_latents,
        cache_text=request.cache_text,
        average=request.average,
        previews=request.previews if previews is None else previews,
        class_images=drawn_at_once(request.side) if request.draws_class else 0,
    )
