"""Format costs as text tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sdtune.planning.measure import TrainingCosts
from sdtune.planning.memory import ALLOWANCE, GIB, SWITCHES, Switches, first_that_fits, memory

_NOTE = (
    "offloading: the VAE and the text encoder are moved to the CPU after their outputs are cached.",
    f"The peaks exclude the CUDA context and kernel workspaces; fits= adds {ALLOWANCE / GIB:g} GiB for them.",
    "A GPU without memory for a batch of images generates fewer at a time; fits= counts one.",
    "A backward pass frees activations while it allocates gradients, so the peak of a step can be less than the sum.",
)

PEAKS = {
    "step": "a training step",
    "encoding": "encoding images",
    "prompts": "encoding prompts",
    "previews": "generating previews",
    "class_images": "generating class images",
    "evaluation": "generating images of the evaluation",
}
"""Phases of a run: attribute of :class:`Memory` -> name."""

_OVERRIDES = {
    "gradient checkpointing": "hardware.gradient_checkpointing=true",
    "8-bit AdamW": "optimizer=adamw8bit",
    "offloading": "hardware.offload=true",
}


def one(
    costs: TrainingCosts,
    accumulation: int,
    devices: int,
    fits: float | None,
    configured: Switches,
    names: str,
    smaller: Callable[[float], str | None],
) -> list[str]:
    """Lines with all costs of one method.

    Args:
        names: names of the memory-saving options that the config already has.
        smaller: returns the settings of a smaller training that fits a device; None if there are none.
        fits: memory of the device in GiB that the training should fit, if any.
        configured: the memory-saving options that the config already has.
    """
    rows = [["parameters", "frozen", "trained", "total", "weights"]]
    for part in (*costs.components, costs.total):
        counts = (part.frozen, part.trained, part.frozen + part.trained)
        rows.append([part.name, *(f"{count:,}" for count in counts), _size(part.bytes)])
    own = memory(costs, configured, accumulation, devices)
    checkpoint = _size(own.gradients + own.state + own.average)
    disk = f"disk: up to three checkpoints of {checkpoint} each, artifact folder: {_size(costs.artifact)}"
    waiting = [f"{part.name}: {_size(part.waiting)} wait in main memory" for part in costs.components if part.waiting]
    lines = [*_aligned(rows), "", *waiting, disk]
    micro_batches = accumulation * devices
    forward, plain, checkpointed = (
        f"{flop * micro_batches / 1e12:.3f}"
        for flop in (costs.plain.forward, costs.plain.flop, costs.checkpointed.flop)
    )
    lines.append(f"per step: {plain} TFLOP, forward pass {forward}; {checkpointed} with gradient checkpointing")
    memories = [memory(costs, switches, accumulation, devices) for switches in SWITCHES.values()]
    unit, unit_name = (GIB, "GiB") if memories[0].peak >= GIB else (1024**2, "MiB")
    table = [[f"{unit_name} per device", *SWITCHES]]
    for name, attribute in (
        ("weights", "weights"),
        ("gradients", "gradients"),
        ("optimizer state", "state"),
        ("EMA of the weights", "average"),
        ("activations", "activations"),
        *((f"peak of {name}", attribute) for attribute, name in PEAKS.items()),
        ("peak", "peak"),
        ("peak of sdtune sample run=RUN", "sample"),
    ):
        if attribute in ("average", "prompts", "class_images", "evaluation") and not getattr(memories[0], attribute):
            continue  # omit rows that do not apply
        table.append([name, *(f"{getattr(cost, attribute) / unit:.2f}" for cost in memories)])
    if fits is not None:
        table.append([f"fits {fits:g} GiB", *("yes" if cost.fits(fits) else "no" for cost in memories)])
    lines += ["", *_aligned(table), "", f"these settings ({names}): peak {_size(own.peak)}"]
    if fits is not None and not own.fits(fits):
        lines.append(_advice(costs, accumulation, devices, fits, configured, smaller))
    elif fits is not None:
        lines[-1] += f", fits {fits:g} GiB"
    return [*lines, "", *_NOTE]


def many(costs: dict[str, TrainingCosts], accumulation: int, devices: int, fits: float | None) -> list[str]:
    """Lines of a table with one row per method."""
    head = ["method", "trained", "artifact", "TFLOP per step", *(f"peak, {name}" for name in ("plain", "all of them"))]
    rows = [[*head, *([f"fits {fits:g} GiB"] if fits is not None else [])]]
    for method, method_costs in costs.items():
        peaks = [memory(method_costs, SWITCHES[name], accumulation, devices).peak for name in ("plain", "all of them")]
        flop = method_costs.plain.flop * accumulation * devices
        row = [
            method,
            f"{method_costs.total.trained:,}",
            _size(method_costs.artifact),
            f"{flop / 1e12:.3f}",
            *map(_size, peaks),
        ]
        rows.append([*row, *([_verdict(method_costs, accumulation, devices, fits)] if fits is not None else [])])
    return [*_aligned(rows), "", f"all of them: {', '.join(list(SWITCHES)[1:-1])}.", *_NOTE]


def _advice(
    costs: TrainingCosts,
    accumulation: int,
    devices: int,
    fits: float,
    configured: Switches,
    smaller: Callable[[float], str | None],
) -> str:
    """Advice: the settings to add to the ``configured`` ones so that the training fits, or what reduces its memory."""
    settings = added(costs, accumulation, devices, fits, configured)
    if settings is None:
        settings = smaller(fits)
    if settings is not None:
        return f"to fit {fits:g} GiB, add: {settings}"
    least = replace(costs, average=0, evaluation=None)
    return (
        "does not fit: at this resolution and micro-batch it"
        f" {_verdict(least, accumulation, devices, fits).removeprefix('no: ')}; use another method"
        " (sdtune plan methods=all) or a smaller model"
    )


def added(costs: TrainingCosts, accumulation: int, devices: int, fits: float, configured: Switches) -> str | None:
    """The memory-saving settings to add to the ``configured`` ones so that the training fits; None if none do."""
    name = first_that_fits(costs, accumulation, devices, fits, configured)
    if name is None:
        return None
    texts = {key: text for key, text in _OVERRIDES.items() if SWITCHES[key] | SWITCHES[name] == SWITCHES[name]}
    return " ".join(text for key, text in texts.items() if SWITCHES[key] | configured != configured)


def _verdict(costs: TrainingCosts, accumulation: int, devices: int, fits: float) -> str:
    name = first_that_fits(costs, accumulation, devices, fits)
    if name is not None:
        return name if name == "plain" else f"with {name}"
    memories = [memory(costs, switches, accumulation, devices) for switches in SWITCHES.values()]
    smallest = min(memories, key=lambda cost: cost.least)
    return f"no: needs at least {_size(smallest.least + ALLOWANCE)}, for {PEAKS[smallest.least_phase]}"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 1024**2:.2f} MiB"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns, separated by two spaces: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
