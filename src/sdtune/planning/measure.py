"""Measure one training step of a method on the meta device."""

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
from sdtune.data.datamodule import encoded_at_once
from sdtune.data.dataset import Batch
from sdtune.hardware.precision import autocast
from sdtune.methods.base import Adapter
from sdtune.planning.kernels import Kernels
from sdtune.planning.meter import Meter
from sdtune.training.gradient_checkpointing import checkpoint_activations

_META = torch.device("meta")


@dataclass(frozen=True)
class ComponentCost:
    """Parameters of a part of the model: how many are frozen, how many trained, and the bytes of all."""

    name: str
    frozen: int
    trained: int
    bytes: int


@dataclass(frozen=True)
class PassCost:
    """A micro-batch, forward and back: floating-point operations, and peaks in bytes (see :class:`Meter`)."""

    forward: int
    flop: int
    activations: int
    together: int


@dataclass(frozen=True)
class TrainingCosts:
    """What a method costs on one device.

    Attributes:
        artifact: bytes of what the run leaves for other programs.
        gradients, state, state_8bit: bytes; the optimizer's state as configured, and of AdamW with 8-bit moments.
        average: bytes of an average of what is trained, where one is kept.
        idle: bytes of the encoders that a step with full caches does not need.
        encoding, previews, drawing: peaks in bytes above weights and state; 0 where nothing is cached, nothing is
            shown, or no images of the class are drawn (by a model of their own, which is counted).
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
        """Of all components."""
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
    """Take one step of ``adapter``, which stands on the meta device with a trainer attached, and count.

    Args:
        count: samples per micro-batch.
        pairs: whether each sample is two images, the subject's and one of its class.
        side: of their square images, in pixels.
        gpu: whether a GPU is planned for, or a CPU.
        cache_latents, cache_text: whether the data keeps what frozen encoders make.
        average: whether an average of the weights is kept.
        previews, class_images: how many are drawn at once; 0 for none.
    """
    adapter.on_fit_start()
    backbone = adapter.backbone
    adapter.prepare_for_device(torch.device("cpu") if not gpu else _META)
    caches = cache_latents and not adapter.open("vae"), cache_text and not adapter.open("text_encoder")
    batch = meta_batch(adapter, 2 * count if pairs else count, side, *caches)
    if pairs:
        batch |= {"instances": count, "prior_weight": 1.0}
    plain = _pass(adapter, batch, gpu)
    gradients = sum(_bytes(p.grad) for _, p in adapter.trainable() if p.grad is not None)
    # Blocks are computed again within backward, where only this context brings the kernels back.
    checkpoint_activations(adapter, context_fn=lambda: (nullcontext(), Kernels(gpu)))
    checkpointed = _pass(adapter, batch, gpu)
    state = _state(adapter)
    parts = {"vae": caches[0], "text_encoder": caches[1], "text_encoder_2": caches[1]}
    components = _components(adapter)
    return TrainingCosts(
        components=components,
        artifact=adapter.artifact_bytes(),
        gradients=gradients,
        state=state,
        state_8bit=sum(_eight_bit(p.numel()) for _, p in adapter.trainable()),
        average=sum(4 * p.numel() for _, p in adapter.trainable()) if average else 0,
        idle=sum(component.bytes for component in components if parts.get(component.name)),
        plain=plain,
        checkpointed=checkpointed,
        encoding=_peak(adapter, gpu, lambda: _encode(backbone, side, gpu)) if caches[0] else 0,
        previews=_peak(adapter, gpu, lambda: _draw(adapter, backbone, adapter.denoise, previews, side))
        if previews
        else 0,
        drawing=_drawing(adapter, gpu, class_images, side) if class_images else 0,
    )


def _encode(backbone: Backbone, side: int, gpu: bool) -> None:
    """What fills the cache of latents, a batch of it."""
    images = encoded_at_once(side, side, "cuda" if gpu else "cpu")
    backbone.encode_images(torch.empty(images, 3, side, side, device=_META))


def _draw(adapter: Adapter, model: Backbone, denoise: Callable[..., Tensor], count: int, side: int) -> None:
    """A step of sampling ``count`` images, and their decoding."""
    # With guidance, each image goes through the UNet twice, with its prompt and without.
    shown = meta_batch(adapter, 2 * count, side, True, True)
    latents = shown["moments"].chunk(2, dim=1)[0]
    denoise(latents, torch.empty(2 * count, dtype=torch.long, device=_META), shown["text"], shown)
    model.decode(latents[: max(1, min(count, DECODED_PIXELS // side**2))])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _components(adapter: Adapter) -> tuple[ComponentCost, ...]:
    found: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        found.setdefault(name.removeprefix("backbone.").split(".")[0], []).append(parameter)
    return tuple(
        ComponentCost(
            name,
            frozen=sum(p.numel() for p in parameters if not p.requires_grad),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            bytes=sum(_bytes(p) for p in parameters),
        )
        for name, parameters in found.items()
    )


def meta_batch(adapter: Adapter, count: int, side: int, cached_latents: bool, cached_text: bool) -> Batch:
    """A micro-batch of ``count`` square images of ``side`` pixels for ``adapter``, on the meta device."""
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


def _meter(adapter: Adapter, *more: Any) -> Meter:
    return Meter([*adapter.parameters(), *adapter.buffers(), *(t for t in more if isinstance(t, Tensor))])


def _pass(adapter: Adapter, batch: Batch, gpu: bool) -> PassCost:
    meter = _meter(adapter, *batch.values())

    def keep(parameter: Tensor) -> None:
        assert parameter.grad is not None
        meter.put_aside(parameter.grad)

    adapter.zero_grad()
    trained: list[Any] = [parameter for _, parameter in adapter.trainable()]
    hooks = [parameter.register_post_accumulate_grad_hook(keep) for parameter in trained]
    with meter:
        with Kernels(gpu), autocast(_META, str(adapter.trainer.precision)):
            # A copy: a step keeps in its batch what it encoded, with the graph of this pass.
            loss = adapter.training_step(dict(batch), 0)
        forward = meter.flop
        torch.autograd.backward(loss)
    for hook in hooks:
        hook.remove()
    return PassCost(forward, meter.flop, meter.activations, meter.together)


def _peak(adapter: Adapter, gpu: bool, work: Callable[[], None], *there: Tensor) -> int:
    """Peak in bytes of ``work``, without gradients, above the adapter's weights and what is ``there`` already."""
    meter = _meter(adapter, *there)
    half = autocast(_META, str(adapter.trainer.precision))
    with Kernels(gpu), meter, torch.no_grad(), half:
        work()
    return meter.activations


def _drawing(adapter: Adapter, gpu: bool, count: int, side: int) -> int:
    """Bytes of the model before training, which draws ``count`` images of the class at once, and its peak."""
    fresh = adapter.source.load(adapter.seed)
    fresh.cast_frozen(str(adapter.trainer.precision))
    fresh.prepare_for_device(torch.device("cpu") if not gpu else _META)
    weights = sum(_bytes(p) for p in fresh.parameters())

    def draw() -> None:
        _draw(adapter, fresh, lambda *inputs: fresh.predict(*inputs[:3]), count, side)

    return weights + _peak(adapter, gpu, draw, *fresh.parameters(), *fresh.buffers())


class NoNumbers(TorchFunctionMode):
    """Within it, a number read from a tensor on the meta device is 1: some optimizers look at what they have summed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        numbers = {Tensor.item: 1.0, Tensor.__float__: 1.0, Tensor.__bool__: True}
        if func in numbers and args[0].is_meta:
            return numbers[func]
        return func(*args, **(kwargs or {}))


def _state(adapter: Adapter) -> int:
    """Bytes of what the optimizer keeps, by a step of it."""
    optimizer = adapter.make_optimizer(adapter.optimizer_groups())
    for _, parameter in adapter.trainable():
        parameter.grad = torch.empty_like(parameter)
    with NoNumbers():
        optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(_bytes(value) for value in values if isinstance(value, Tensor))


def _eight_bit(count: int) -> int:
    """Bytes of AdamW's two moments of ``count`` parameters in blocks of 256 with a float32 scale each.

    Tensors below 4096 values keep float32 (Dettmers et al. 2022; the defaults of bitsandbytes).
    """
    return 2 * (count + 4 * math.ceil(count / 256)) if count >= 4096 else 8 * count
