"""From figures to bytes on a device, with the switches that save some."""

from __future__ import annotations

from dataclasses import dataclass

from sdtune.planning.measure import Figures

GIB = 1024**3

ALLOWANCE = GIB // 2
"""For what is not counted: CUDA's context, the kernels' work space, gaps. A guess, not a measurement."""


@dataclass(frozen=True)
class Switches:
    """What may be switched on to save memory."""

    checkpointing: bool = False
    eight_bit: bool = False
    offload: bool = False


SWITCHES = {
    "plain": Switches(),
    "gradient checkpointing": Switches(checkpointing=True),
    "8-bit AdamW": Switches(eight_bit=True),
    "offloading": Switches(offload=True),
    "all of them": Switches(True, True, True),
}
"""In the order in which they are tried."""


@dataclass(frozen=True)
class Memory:
    """Bytes on a device.

    Attributes:
        activations: peak of one forward and backward pass, gradients apart.
        step: peak of a training step. Gradients come as activations go, so it is less than the sum, unless
            gradients of a micro-batch before are there already.
        encoding: peak while images are encoded for the cache.
        previews: peak while previews are drawn.
        drawing: peak while images of the class are drawn, before training; 0 where none are.
    """

    weights: int
    gradients: int
    state: int
    average: int
    activations: int
    step: int
    encoding: int
    previews: int
    drawing: int

    @property
    def peak(self) -> int:
        return max(self.step, self.encoding, self.previews, self.drawing)

    def fits(self, gib: float) -> bool:
        """Whether a device of ``gib`` GiB holds it."""
        return self.peak + ALLOWANCE <= gib * GIB


def memory(figures: Figures, switches: Switches, accumulation: int, devices: int) -> Memory:
    """``accumulation``: micro-batches a step and device."""
    weights = figures.total.bytes
    resident = weights - (figures.idle if switches.offload else 0)
    state = figures.state_8bit if switches.eight_bit else figures.state
    cost = figures.checkpointed if switches.checkpointing else figures.plain
    # DDP's buckets hold the gradients a second time.
    buckets = figures.gradients if devices > 1 else 0
    passing = cost.together if accumulation == 1 else cost.activations + figures.gradients
    return Memory(
        weights=resident,
        gradients=figures.gradients,
        state=state,
        average=figures.average,
        activations=cost.activations,
        # The optimizer's step finds all gradients and no activations.
        step=resident + state + figures.average + buckets + max(passing, figures.gradients),
        encoding=weights + figures.encoding,
        previews=weights + state + figures.average + figures.previews if figures.previews else 0,
        drawing=weights + figures.drawing if figures.drawing else 0,
    )


def first_that_fits(figures: Figures, accumulation: int, devices: int, gib: float) -> str | None:
    """The first of :data:`SWITCHES` with which a device of ``gib`` GiB suffices."""
    found = (name for name, switches in SWITCHES.items() if memory(figures, switches, accumulation, devices).fits(gib))
    return next(found, None)
