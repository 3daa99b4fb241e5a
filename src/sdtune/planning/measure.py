"""Measure the memory and FLOPs of one training step of a method on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdtune.backbone.backbone import DECODED_PIXELS, Backbone
from sdtune.data.batch_sizes import vae_batch_size
from sdtune.data.dataset import Batch
from sdtune.hardware.precision import autocast
from sdtune.methods.base import Adapter
from sdtune.planning.kernels import Kernels
from sdtune.planning.meter import Meter
from sdtune.training.gradient_checkpointing import checkpoint_activations

_META = torch.device("meta")


@dataclass(frozen=True)
class ComponentCost:
    """Parameter counts (frozen, trained) and bytes of a model component."""

    name: str
    frozen: int
    trained: int
    bytes: int


@dataclass(frozen=True)
class PassCost:
    """Cost of the forward and backward pass of a micro-batch: FLOPs, and peaks in bytes (see :class:`Meter`)."""

    forward: int
    flop: int
    activations: int
    together: int


@dataclass(frozen=True)
class TrainingCosts:
    """Costs of a method on one device.

    Attributes:
        artifact: size of the artifact in bytes.
        gradients, state: bytes of the gradients and of the optimizer state as configured.
        state_8bit: bytes of the optimizer state of AdamW with 8-bit moments.
        average: bytes of the EMA of the trained weights; 0 if disabled.
        idle: bytes of the encoders that a step with full caches does not need.
        plain, checkpointed: a micro-batch without and with gradient checkpointing.
        encoding, previews: peaks in bytes above weights and state while encoding images for the cache and while
            generating previews; 0 if disabled.
        drawing: peak in bytes while generating class images, including the separate model for it; 0 if disabled.
    """

    components: tuple[ComponentCost, ...]
    artifact: int
    gradients: int
    state: int
    state_8bit: int
    average: int
    idle: int
    plain: PassCost
    checkpointed: PassCost
    encoding: int
    previews: int
    drawing: int

    @property
    def total(self) -> ComponentCost:
        """Sum over all components."""
        counts = zip(*((c.frozen, c.trained, c.bytes) for c in self.components), strict=True)
        return ComponentCost("total", *map(sum, counts))


def measure(
    adapter: Adapter,
    *,
    count: int,
    pairs: bool,
    side: int,
    gpu: bool,
    cache_latents: bool,
    cache_text: bool,
    average: bool,
    previews: int,
    class_images: int,
) -> TrainingCosts:
    """Run one training step of ``adapter`` on the meta device and measure it.

    Args:
        adapter: the method, on the meta device, with an attached trainer.
        count: samples per micro-batch.
        pairs: True if each sample is a subject image and a class image.
        side: side of the square images, in pixels.
        gpu: True to plan for a GPU, False for a CPU.
        cache_latents, cache_text: whether the outputs of frozen encoders are cached.
        average: whether an EMA of the weights is kept.
        previews, class_images: batch size for generating previews and class images; 0 for none.
    """
    adapter.on_fit_start()
    backbone = adapter.backbone
    adapter.prepare_for_device(torch.device("cpu") if not gpu else _META)
    caches = cache_latents and not adapter.trains("vae"), cache_text and not adapter.trains("text_encoder")
    batch = meta_batch(adapter, 2 * count if pairs else count, side, *caches)
    if pairs:
        batch |= {"subject_count": count, "prior_weight": 1.0}
    plain = _pass(adapter, batch, gpu)
    gradients = sum(_bytes(p.grad) for _, p in adapter.trainable() if p.grad is not None)
    # Checkpointed blocks are recomputed in backward, where Kernels is active only through this context.
    checkpoint_activations(adapter, context_fn=lambda: (nullcontext(), Kernels(gpu)))
    checkpointed = _pass(adapter, batch, gpu)
    state = _optimizer_state(adapter)
    cached = {"vae": caches[0], "text_encoder": caches[1], "text_encoder_2": caches[1]}
    components = _components(adapter)
    return TrainingCosts(
        components=components,
        artifact=adapter.artifact_bytes(),
        gradients=gradients,
        state=state,
        state_8bit=sum(_eight_bit_state(p.numel()) for _, p in adapter.trainable()),
        average=sum(4 * p.numel() for _, p in adapter.trainable()) if average else 0,
        idle=sum(component.bytes for component in components if cached.get(component.name)),
        plain=plain,
        checkpointed=checkpointed,
        encoding=_peak(adapter, gpu, lambda: _encode(backbone, side, gpu)) if caches[0] else 0,
        previews=_peak(adapter, gpu, lambda: _generate(adapter, backbone, adapter.denoise, previews, side))
        if previews
        else 0,
        drawing=_class_images_peak(adapter, gpu, class_images, side) if class_images else 0,
    )


def _encode(backbone: Backbone, side: int, gpu: bool) -> None:
    """Encode one batch for the latent cache."""
    images = vae_batch_size(side, side, "cuda" if gpu else "cpu")
    backbone.encode_images(torch.empty(images, 3, side, side, device=_META))


def _generate(adapter: Adapter, model: Backbone, denoise: Callable[..., Tensor], count: int, side: int) -> None:
    """Run one sampling step of ``count`` images and decode them."""
    # Classifier-free guidance doubles the batch: each image with its prompt and with the empty prompt.
    batch = meta_batch(adapter, 2 * count, side, True, True)
    latents = batch["moments"].chunk(2, dim=1)[0]
    denoise(latents, torch.empty(2 * count, dtype=torch.long, device=_META), batch["text"], batch)
    model.decode(latents[: max(1, min(count, DECODED_PIXELS // side**2))])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _components(adapter: Adapter) -> tuple[ComponentCost, ...]:
    parameters_of: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        parameters_of.setdefault(name.removeprefix("backbone.").split(".")[0], []).append(parameter)
    return tuple(
        ComponentCost(
            name,
            frozen=sum(p.numel() for p in parameters if not p.requires_grad),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            bytes=sum(_bytes(p) for p in parameters),
        )
        for name, parameters in parameters_of.items()
    )


def meta_batch(adapter: Adapter, count: int, side: int, cached_latents: bool, cached_text: bool) -> Batch:
    """Micro-batch of ``count`` square images of ``side`` pixels for ``adapter``, on the meta device."""
    facts, cells = adapter.backbone.facts, side // adapter.backbone.facts.factor
    images = torch.empty(count, 3, side, side, device=_META)
    batch: Batch = {"prompts": [""] * count, "step": 0, "positions": list(range(count))}
    if cached_latents:
        batch["moments"] = torch.empty(count, 2 * facts.latent_channels, cells, cells, device=_META)
    else:
        batch["pixels"] = images
    if cached_text:
        batch["text"] = torch.empty(count, *adapter.backbone.text_shape, device=_META)
    return adapter.synthetic_batch(batch, images)


def _meter(adapter: Adapter, *inputs: Any) -> Meter:
    return Meter([*adapter.parameters(), *adapter.buffers(), *(t for t in inputs if isinstance(t, Tensor))])


def _pass(adapter: Adapter, batch: Batch, gpu: bool) -> PassCost:
    meter = _meter(adapter, *batch.values())

    def put_gradient_aside(parameter: Tensor) -> None:
        assert parameter.grad is not None
        meter.put_aside(parameter.grad)

    adapter.zero_grad()
    trained: list[Any] = [parameter for _, parameter in adapter.trainable()]
    hooks = [parameter.register_post_accumulate_grad_hook(put_gradient_aside) for parameter in trained]
    with meter:
        with Kernels(gpu), autocast(_META, str(adapter.trainer.precision)):
            # Pass a copy: the step stores its encoder outputs in the batch, with the graph of this pass.
            loss = adapter.training_step(dict(batch), 0)
        forward = meter.flop
        torch.autograd.backward(loss)
    for hook in hooks:
        hook.remove()
    return PassCost(forward, meter.flop, meter.activations, meter.together)


def _peak(adapter: Adapter, gpu: bool, work: Callable[[], None], *existing: Tensor) -> int:
    """Peak in bytes of ``work``, without gradients, above the adapter's weights and ``existing`` tensors."""
    meter = _meter(adapter, *existing)
    mixed = autocast(_META, str(adapter.trainer.precision))
    with Kernels(gpu), meter, torch.no_grad(), mixed:
        work()
    return meter.activations


def _class_images_peak(adapter: Adapter, gpu: bool, count: int, side: int) -> int:
    """Peak in bytes while generating ``count`` class images, including the weights of the base model for it."""
    base = adapter.source.load(adapter.seed)
    base.cast_frozen(str(adapter.trainer.precision))
    base.prepare_for_device(torch.device("cpu") if not gpu else _META)
    weights = sum(_bytes(p) for p in base.parameters())

    def generate() -> None:
        _generate(adapter, base, lambda *inputs: base.predict(*inputs[:3]), count, side)

    return weights + _peak(adapter, gpu, generate, *base.parameters(), *base.buffers())


class MetaItems(TorchFunctionMode):
    """Mode in which reading a number from a meta tensor returns 1, since some optimizers read values of tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        numbers = {Tensor.item: 1.0, Tensor.__float__: 1.0, Tensor.__bool__: True}
        if func in numbers and args[0].is_meta:
            return numbers[func]
        return func(*args, **(kwargs or {}))


def _optimizer_state(adapter: Adapter) -> int:
    """Bytes of the optimizer state, measured after one optimizer step."""
    optimizer = adapter.make_optimizer(adapter.optimizer_groups())
    for _, parameter in adapter.trainable():
        parameter.grad = torch.empty_like(parameter)
    with MetaItems():
        optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(_bytes(value) for value in values if isinstance(value, Tensor))


def _eight_bit_state(count: int) -> int:
    """Bytes of AdamW's two 8-bit moments of a tensor of ``count`` values, in blocks of 256 with one float32 scale each.

    Tensors below 4096 values keep float32 moments (Dettmers et al. 2022; the defaults of bitsandbytes).
    """
    return 2 * (count + 4 * math.ceil(count / 256)) if count >= 4096 else 8 * count
