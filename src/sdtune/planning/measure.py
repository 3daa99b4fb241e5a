"""Measure the memory and FLOPs of one training step of a method on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.latents import DECODED_PIXELS
from sdtune.backbone.quantization import Quantized, quantize
from sdtune.conditioning import Conditioning
from sdtune.data.batch_sizes import text_batch_size, vae_batch_size
from sdtune.data.dataset import Batch
from sdtune.hardware.precision import HALVES, autocast
from sdtune.methods.base import Adapter
from sdtune.planning.kernels import Kernels
from sdtune.planning.meter import Meter
from sdtune.sampling.loop import Predictor, WithConditioners
from sdtune.training.gradient_checkpointing import checkpoint_activations

_META = torch.device("meta")

SAMPLE_BATCH = 4
"""Images per batch of ``sdtune sample``."""


@dataclass(frozen=True)
class ComponentCost:
    """Parameter counts (frozen, trained) and bytes of a model component.

    Attributes:
        bytes: bytes on the device during a training step.
        waiting: bytes that wait in main memory until prompts are encoded.
    """

    name: str
    frozen: int
    trained: int
    bytes: int
    waiting: int = 0


@dataclass(frozen=True)
class PassCost:
    """Cost of the forward and backward pass of a micro-batch: FLOPs, and peaks in bytes (see :class:`Meter`)."""

    forward: int
    flop: int
    activations: int
    together: int


@dataclass(frozen=True)
class GenerationCost:
    """Cost in bytes of generating images with a model that is loaded for it.

    Attributes:
        weights: weights on the device while images are denoised.
        encoders: weights of text encoders that are on the device only while prompts are encoded.
        activations, single: peaks above ``weights`` for a batch and for one image.
    """

    weights: int
    encoders: int
    activations: int
    single: int

    @property
    def peak(self) -> int:
        """Peak for a batch."""
        return self.weights + max(self.encoders, self.activations)

    @property
    def least(self) -> int:
        """Peak for one image at a time."""
        return self.weights + max(self.encoders, self.single)


@dataclass(frozen=True)
class TrainingCosts:
    """Costs of a method on one device.

    Attributes:
        artifact: size of the artifact in bytes.
        gradients, state: bytes of the gradients and of the optimizer state as configured.
        state_8bit: bytes of the optimizer state of AdamW with 8-bit moments.
        average: bytes of the EMA of the trained weights; 0 if disabled.
        idle_vae, idle_text: bytes of the encoders that a step with full caches does not need.
        plain, checkpointed: a micro-batch without and with gradient checkpointing.
        encoding: peak in bytes above the weights while encoding images for the cache; 0 if disabled.
        prompts: bytes above the weights while T5 encodes prompts, in place of the denoiser; None without T5.
        previews, single_preview: peaks in bytes above weights and state while generating a batch of previews, and one;
            0 if disabled.
        class_images, evaluation: costs of generating class images before the training, and images after it; None if
            disabled.
        sample: cost of ``sdtune sample`` with the artifact and the default settings.
        gpu: whether the costs are those of a GPU.
    """

    components: tuple[ComponentCost, ...]
    artifact: int
    gradients: int
    state: int
    state_8bit: int
    average: int
    idle_vae: int
    idle_text: int
    plain: PassCost
    checkpointed: PassCost
    encoding: int
    prompts: int | None
    previews: int
    single_preview: int
    class_images: GenerationCost | None
    evaluation: GenerationCost | None
    sample: GenerationCost
    gpu: bool

    @property
    def idle(self) -> int:
        """Bytes of the encoders that a step with full caches does not need."""
        return self.idle_vae + self.idle_text

    @property
    def total(self) -> ComponentCost:
        """Sum over all components."""
        counts = zip(*((c.frozen, c.trained, c.bytes, c.waiting) for c in self.components), strict=True)
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
    evaluation: int,
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
        previews, class_images, evaluation: batch size for generating images during, before and after the training; 0
            for none.
    """
    adapter.on_fit_start()
    backbone = adapter.backbone
    adapter.prepare_for_device(torch.device("cpu") if not gpu else _META)
    caches = cache_latents and not adapter.trains("vae"), cache_text and not adapter.trains("text_encoder")
    waits = caches[1] or (cache_text and _cache_waiting_states(backbone))
    batch = meta_batch(adapter, 2 * count if pairs else count, side, *caches)
    if pairs:
        batch |= {"subject_count": count, "prior_weight": 1.0}
    plain = _pass(adapter, batch, gpu)
    gradients = sum(_bytes(p.grad) for _, p in adapter.trainable() if p.grad is not None)
    # Checkpointed blocks are recomputed in backward, where Kernels is active only through this context.
    checkpoint_activations(adapter, context_fn=lambda: (nullcontext(), Kernels(gpu)))
    checkpointed = _pass(adapter, batch, gpu)
    state = _optimizer_state(adapter)
    components = _components(adapter, waits)
    denoiser = sum(component.bytes for component in components if component.name == "denoiser")
    waiting = sum(component.waiting for component in components)
    encoders = sum(component.bytes for component in components if component.name.startswith("text_encoder"))
    generation = _Generation(adapter, gpu)
    return TrainingCosts(
        components=components,
        artifact=adapter.artifact_bytes(),
        gradients=gradients,
        state=state,
        state_8bit=sum(_eight_bit_state(p.numel()) for _, p in adapter.trainable()),
        average=sum(4 * p.numel() for _, p in adapter.trainable()) if average else 0,
        idle_vae=sum(c.bytes for c in components if c.name == "vae") if caches[0] else 0,
        idle_text=encoders if caches[1] else 0,
        plain=plain,
        checkpointed=checkpointed,
        encoding=_peak(adapter, gpu, "32-true", lambda: _encode(backbone, side, gpu)) if caches[0] else 0,
        prompts=waiting - denoiser + _prompts(adapter, gpu) if waiting else None,
        previews=_previews(adapter, gpu, previews) if previews else 0,
        single_preview=_previews(adapter, gpu, 1) if previews else 0,
        class_images=generation.cost(class_images, side, str(adapter.trainer.precision)) if class_images else None,
        evaluation=generation.cost(evaluation, backbone.facts.side, trained=True) if evaluation else None,
        sample=generation.cost(SAMPLE_BATCH, backbone.facts.side, trained=True),
        gpu=gpu,
    )


def _cache_waiting_states(backbone: Backbone) -> bool:
    """Whether the states of the text encoders that wait in main memory can be cached; ``backbone`` then has them."""
    if backbone.waiting_are_frozen:
        states = backbone.encode_waiting([""])[0]
        backbone.waiting_states = lambda prompt: states
    return backbone.waiting_are_frozen


def _previews(adapter: Adapter, gpu: bool, count: int) -> int:
    mixed, side = str(adapter.trainer.precision), adapter.backbone.facts.side
    return _peak(adapter, gpu, mixed, lambda: _generate(adapter, adapter.backbone, adapter, count, side))


def _prompts(adapter: Adapter, gpu: bool) -> int:
    """Activations of the text encoders for one batch of the text cache."""
    texts = [""] * text_batch_size(has_t5=adapter.source.facts.family.has_t5)
    waiting = [p for encoder in adapter.backbone.waiting_encoders.values() for p in encoder.parameters()]
    return _peak(adapter, gpu, str(adapter.trainer.precision), lambda: adapter.encode_text(texts), *waiting)


def _encode(backbone: Backbone, side: int, gpu: bool) -> None:
    """Encode one batch for the latent cache."""
    images = vae_batch_size(side, side, "cuda" if gpu else "cpu")
    backbone.encode_images(torch.empty(images, 3, side, side, device=_META))


def _generate(adapter: Adapter, model: Backbone, predictor: Predictor, count: int, side: int) -> None:
    """Run one sampling step of ``count`` images and decode them."""
    # Classifier-free guidance doubles the batch: each image with its prompt and with the empty prompt.
    batch = meta_batch(adapter, 2 * count, side, True, True)
    latents = batch["moments"].chunk(2, dim=1)[0]
    conditions = batch["encoded_conditions"] if "encoded_conditions" in batch else batch["conditions"]
    timesteps = torch.empty(2 * count, dtype=torch.long, device=_META)
    predictor.denoise(latents, timesteps, batch["conditioning"], conditions)
    model.decode(latents[: max(1, min(count, DECODED_PIXELS // side**2))])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _components(adapter: Adapter, waits: bool) -> tuple[ComponentCost, ...]:
    counts: dict[int, int] = {}
    for layer in adapter.modules():
        if isinstance(layer, Quantized):
            counts |= {id(layer.packed): layer.shape.numel(), id(layer.scales): 0}
    parameters_of: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        parameters_of.setdefault(name.removeprefix("backbone.").split(".")[0], []).append(parameter)
    tables = {"denoiser": _position_table(adapter.backbone)}
    registered = tuple(
        ComponentCost(
            name,
            frozen=sum(counts.get(id(p), p.numel()) for p in parameters if not p.requires_grad),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            bytes=sum(_bytes(p) for p in parameters) + tables.get(name, 0),
        )
        for name, parameters in parameters_of.items()
    )
    return (*registered, *_waiting_encoders(adapter.backbone, waits))


def _position_table(backbone: Backbone) -> int:
    """Bytes of the denoiser's buffers: the position table of a transformer."""
    return sum(_bytes(buffer) for buffer in backbone.denoiser.buffers())


def _waiting_encoders(backbone: Backbone, waits: bool) -> list[ComponentCost]:
    """Cost of the text encoders that wait in main memory, or are on the device in each step if not ``waits``."""
    costs = []
    for name, encoder in backbone.waiting_encoders.items():
        parameters = list(encoder.parameters())
        size = sum(_bytes(p) for p in parameters)
        count = sum(p.numel() for p in parameters)
        costs.append(ComponentCost(name, count, 0, 0 if waits else size, size if waits else 0))
    return costs


def meta_batch(adapter: Adapter, count: int, side: int, cached_latents: bool, cached_text: bool) -> Batch:
    """Micro-batch of ``count`` square images of ``side`` pixels for ``adapter``, on the meta device."""
    facts, cells = adapter.backbone.facts, side // adapter.backbone.facts.factor
    images = torch.empty(count, 3, side, side, device=_META)
    batch: Batch = {"prompts": [""] * count, "step": 0, "positions": list(range(count)), "conditions": {}}
    if cached_latents:
        batch["moments"] = torch.empty(count, 2 * facts.latent_channels, cells, cells, device=_META)
    else:
        batch["pixels"] = images
    if cached_text:
        shapes = adapter.backbone.text_shapes
        batch["conditioning"] = Conditioning(
            **{name: torch.empty(count, *shape, device=_META) for name, shape in shapes.items()}
        )
    return adapter.synthetic_batch(batch, images)


def _meter(adapter: Adapter, *inputs: Any) -> Meter:
    return Meter([*adapter.parameters(), *adapter.buffers(), *_tensors(inputs)])


def _tensors(inputs: Any) -> list[Tensor]:
    """The tensors in nested ``inputs``."""
    if isinstance(inputs, Tensor):
        return [inputs]
    inner = inputs.tensors() if isinstance(inputs, Conditioning) else inputs
    values = inner.values() if isinstance(inner, Mapping) else inner if isinstance(inner, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]


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


def _peak(adapter: Adapter, gpu: bool, precision: str, work: Callable[[], object], *existing: Tensor) -> int:
    """Peak in bytes of ``work``, without gradients, above the adapter's weights and ``existing`` tensors."""
    meter = _meter(adapter, *existing)
    with Kernels(gpu), meter, torch.no_grad(), autocast(_META, precision):
        work()
    return meter.activations


class _Generation:
    """Counts the costs of models that only generate images, as :mod:`sdtune.sampling.load` loads them."""

    def __init__(self, adapter: Adapter, gpu: bool) -> None:
        self._adapter, self._gpu = adapter, gpu

    def cost(self, count: int, side: int, cpu_precision: str = "32-true", *, trained: bool = False) -> GenerationCost:
        """Cost of ``count`` images of ``side`` pixels at a time.

        Args:
            trained: whether the images need the models that the method adds to the backbone, such as a ControlNet.
            cpu_precision: precision on a CPU; a GPU generates in half precision.
        """
        half = HALVES.get("bf16-mixed" if self._gpu else cpu_precision)
        base = self._adapter.source.load(self._adapter.seed, half)
        base.cast_frozen("bf16-mixed" if self._gpu else cpu_precision)
        quantize(base, self._adapter.source.quantize)
        base.prepare_for_device(_META if self._gpu else torch.device("cpu"))
        if self._adapter.vae_tiling:
            base.decode_in_tiles()
        total = sum(_bytes(p) for p in base.parameters()) + _position_table(base)
        encoders = sum(_bytes(p) for encoder in base.trainable_encoders.values() for p in encoder.parameters())
        # While T5 encodes prompts, the denoiser is in main memory.
        replaced = sum(_bytes(p) for p in base.denoiser.parameters()) + _position_table(base)
        waiting = sum(cost.waiting - replaced for cost in _waiting_encoders(base, True)) if self._gpu else 0
        precision = "32-true" if self._gpu else cpu_precision

        def peak(images: int) -> int:
            def generate() -> None:
                _generate(self._adapter, base, WithConditioners(base), images, side)

            return _peak(self._adapter, self._gpu, precision, generate, *base.parameters(), *base.buffers())

        parked = encoders if self._gpu else 0
        added = [p for name, p in self._adapter.named_parameters() if trained and not name.startswith("backbone.")]
        more = sum(p.numel() for p in added) * (2 if self._gpu else 4)
        if trained:  # a LoRA is merged into a dense weight beside the quantized one
            merged = [layer for layer in self._adapter.modules() if hasattr(layer, "lora_A")]
            more += sum(_bytes(m.base_layer.weight) for m in merged if isinstance(m.base_layer, Quantized))
        return GenerationCost(total - parked + more, parked + waiting, peak(count), peak(1))


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
