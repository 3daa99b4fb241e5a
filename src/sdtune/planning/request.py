"""Build a method with a trainer on the meta device and count its costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytorch_lightning as pl
import torch

from sdtune.backbone.quantization import check_quantization, quantize
from sdtune.data.batch_sizes import class_image_batch_size
from sdtune.hardware.precision import HALVES
from sdtune.methods.base import Adapter
from sdtune.planning.measure import TrainingCosts, measure


@dataclass(frozen=True)
class PlanRequest:
    """Checked settings of a method whose costs are counted.

    Attributes:
        make_adapter: creates the method on a backbone on the meta device; its model is not yet configured.
        micro_batch: samples per micro-batch and process.
        pairs: True if each sample is a subject image and a class image.
        side: side of the square images, in pixels.
        accumulation: micro-batches per step.
        precision: Lightning's precision, not ``auto``.
        gpu: True to plan for a GPU, False for a CPU.
        gradient_checkpointing: whether activations are recomputed in backward.
        cache_latents, cache_text: whether the outputs of frozen encoders are cached.
        average: whether an EMA of the weights is kept.
        previews: batch size for generating previews; 0 for none.
        draws_class: whether class images are generated before the training.
        evaluation: batch size for generating images after the training; 0 for none.
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
    evaluation: int


def meta_adapter(request: PlanRequest) -> Adapter:
    """The requested method on the meta device, with an attached trainer."""
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
    half = HALVES.get(request.precision)
    if half is not None and adapter.denoiser_is_read_only:
        # It is loaded in half precision, with its position table.
        for buffer in adapter.backbone.denoiser.buffers():
            buffer.data = buffer.data.to(half)
    check_quantization(adapter.source.quantize, adapter.parts)
    quantize(adapter.backbone, adapter.source.quantize)
    return adapter


def count(request: PlanRequest, previews: int | None = None) -> TrainingCosts:
    """Build the method on the meta device and measure it; ``previews`` overrides ``request.previews``."""
    return measure(
        meta_adapter(request),
        count=request.micro_batch,
        pairs=request.pairs,
        side=request.side,
        gpu=request.gpu,
        cache_latents=request.cache_latents,
        cache_text=request.cache_text,
        average=request.average,
        previews=request.previews if previews is None else previews,
        class_images=class_image_batch_size(request.side) if request.draws_class else 0,
        evaluation=request.evaluation,
    )
