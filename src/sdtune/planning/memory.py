"""Memory on a device from measured costs, with the switches that save memory."""

from __future__ import annotations

from dataclasses import dataclass

from sdtune.planning.measure import TrainingCosts

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


def memory(costs: TrainingCosts, switches: Switches, accumulation: int, devices: int) -> Memory:
    """``accumulation``: micro-batches per step and device."""
    weights = costs.total.bytes
    resident = weights - (costs.idle if switches.offload else 0)
    state = costs.state_8bit if switches.eight_bit else costs.state
    cost = costs.checkpointed if switches.checkpointing else costs.plain
    # DDP's buckets hold the gradients a second time.
    buckets = costs.gradients if devices > 1 else 0
    passing = cost.together if accumulation == 1 else cost.activations + costs.gradients
    return Memory(
        weights=resident,
        gradients=costs.gradients,
        state=state,
        average=costs.average,
        activations=cost.activations,
        # The optimizer's step finds all gradients and no activations.
        step=resident + state + costs.average + buckets + max(passing, costs.gradients),
        encoding=weights + costs.encoding,
        previews=weights + state + costs.average + costs.previews if costs.previews else 0,
        drawing=weights + costs.drawing if costs.drawing else 0,
    )


def first_that_fits(costs: TrainingCosts, accumulation: int, devices: int, gib: float) -> str | None:
    """The first of :data:`SWITCHES` with which a device of ``gib`` GiB suffices."""
    found = (name for name, switches in SWITCHES.items() if memory(costs, switches, accumulation, devices).fits(gib))
    return next(found, None)
