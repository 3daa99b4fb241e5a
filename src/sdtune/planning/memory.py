"""Memory on a device, computed from measured costs and memory-saving switches."""

from __future__ import annotations

from dataclasses import dataclass

from sdtune.planning.measure import GenerationCost, TrainingCosts

GIB = 1024**3

ALLOWANCE = GIB
"""Bytes for uncounted memory: CUDA context, kernel workspaces, fragmentation. An estimate, not a measurement."""


_NO_IMAGES = GenerationCost(0, 0, 0, 0)


@dataclass(frozen=True)
class Switches:
    """Memory-saving options."""

    checkpointing: bool = False
    eight_bit: bool = False
    offload: bool = False

    def __or__(self, other: Switches) -> Switches:
        """The options that are on in either of the two."""
        return Switches(
            self.checkpointing or other.checkpointing, self.eight_bit or other.eight_bit, self.offload or other.offload
        )


SWITCHES = {
    "plain": Switches(),
    "gradient checkpointing": Switches(checkpointing=True),
    "8-bit AdamW": Switches(eight_bit=True),
    "offloading": Switches(offload=True),
    "all of them": Switches(True, True, True),
}
"""In the order of :func:`first_that_fits`."""


@dataclass(frozen=True)
class Memory:
    """Memory on a device, in bytes.

    Attributes:
        state: optimizer state.
        average: EMA of the trained weights.
        activations: peak of one forward and backward pass, without gradients.
        step: peak of a training step. Backward frees activations while it allocates gradients, so the peak is less
            than their sum, except if gradients of an earlier micro-batch exist.
        encoding: peak while encoding images for the cache.
        prompts: peak while T5 encodes prompts for the cache; 0 without T5.
        previews: peak while generating previews; 0 if disabled.
        class_images: peak while generating class images, before the training; 0 if there are none.
        evaluation: peak while generating images after the training; 0 if disabled.
        sample: peak of ``sdtune sample`` with the artifact and the default settings.
        least: peak of the run if a GPU without memory for a batch of images generates one at a time.
        least_phase: name of the attribute with the phase of ``least``.
    """

    weights: int
    gradients: int
    state: int
    average: int
    activations: int
    step: int
    encoding: int
    prompts: int
    previews: int
    class_images: int
    evaluation: int
    sample: int
    least: int
    least_phase: str

    @property
    def peak(self) -> int:
        """Peak of the run; ``sdtune sample`` is another command."""
        return max(self.step, self.encoding, self.prompts, self.previews, self.class_images, self.evaluation)

    def fits(self, gib: float) -> bool:
        """Whether the least peak and :data:`ALLOWANCE` fit on a device of ``gib`` GiB."""
        return self.least + ALLOWANCE <= gib * GIB


def memory(costs: TrainingCosts, switches: Switches, accumulation: int, devices: int) -> Memory:
    """Compute the memory on each of ``devices``, with ``accumulation`` micro-batches per step and device."""
    weights = costs.total.bytes
    resident = weights - (costs.idle if switches.offload else 0)
    state = costs.state_8bit if switches.eight_bit else costs.state
    cost = costs.checkpointed if switches.checkpointing else costs.plain
    # DDP's buckets are a second copy of the gradients.
    buckets = costs.gradients if devices > 1 else 0
    pass_peak = cost.together if accumulation == 1 else cost.activations + costs.gradients
    # During the optimizer's step all gradients and no activations are allocated.
    step = resident + state + costs.average + buckets + max(pass_peak, costs.gradients)
    encoding, prompts = weights + costs.encoding, 0 if costs.prompts is None else weights + costs.prompts
    # While previews are generated, an offloaded VAE is on the device, offloaded text encoders only for the prompts, and
    # on a GPU the trained weights are in main memory if their average replaces them.
    parked = costs.idle_text if switches.offload else 0
    before_previews = weights - parked + state + (0 if costs.gpu else costs.average)
    previews, single_preview = (
        before_previews + max(parked, activations) if activations else 0
        for activations in (costs.previews, costs.single_preview)
    )
    class_images, evaluation = (cost or _NO_IMAGES for cost in (costs.class_images, costs.evaluation))
    peaks = {"step": step, "encoding": encoding, "prompts": prompts, "previews": previews}
    peaks |= {"class_images": class_images.peak, "evaluation": evaluation.peak}
    if costs.gpu:
        peaks |= {"previews": single_preview, "class_images": class_images.least, "evaluation": evaluation.least}
    least_phase = max(peaks, key=lambda phase: peaks[phase])
    return Memory(
        weights=resident,
        gradients=costs.gradients,
        state=state,
        average=costs.average,
        activations=cost.activations,
        step=step,
        encoding=encoding,
        prompts=prompts,
        previews=previews,
        class_images=class_images.peak,
        evaluation=evaluation.peak,
        sample=costs.sample.peak,
        least=peaks[least_phase],
        least_phase=least_phase,
    )


def first_that_fits(
    costs: TrainingCosts, accumulation: int, devices: int, gib: float, configured: Switches | None = None
) -> str | None:
    """First of :data:`SWITCHES` with which the training fits on a device of ``gib`` GiB; None if none does.

    Args:
        configured: options that are on in addition.
    """
    for name, added in SWITCHES.items():
        switches = added | (configured or Switches())
        is_allowed = devices == 1 or not switches.offload  # every process needs the full model
        if is_allowed and memory(costs, switches, accumulation, devices).fits(gib):
            return name
    return None
