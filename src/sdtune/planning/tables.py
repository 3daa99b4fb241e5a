"""Format costs as text tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdtune.planning.measure import TrainingCosts
from sdtune.planning.memory import ALLOWANCE, GIB, SWITCHES, Switches, first_that_fits, memory

_NOTE = (
    "offloading: the VAE and the text encoder are moved to the CPU after their outputs are cached.",
    f"The peaks exclude the CUDA context and kernel workspaces; fits= adds {ALLOWANCE / GIB:g} GiB for them.",
    "A GPU without memory for a batch of images generates fewer at a time; fits= counts one.",
)

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
    smaller: Callable[[float], str | None],
) -> list[str]:
    """Lines with all costs of one method.

    Args:
        smaller: returns the settings of a smaller micro-batch or resolution that fit a device; None if none do.
        fits: memory of the device in GiB that the training should fit, if any.
        configured: the memory-saving options that the config already has.
    """
    rows = [["parameters", "frozen", "trained", "total", "weights"]]
    for part in (*costs.components, costs.total):
        counts = (part.frozen, part.trained, part.frozen + part.trained)
        rows.append([part.name, *(f"{count:,}" for count in counts), _size(part.bytes)])
    lines = [*_aligned(rows), "", f"artifact folder: {_size(costs.artifact)}"]
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
        ("peak in a training step", "step"),
        ("peak while encoding images", "encoding"),
        ("peak while generating previews", "previews"),
        ("peak while generating class images", "class_images"),
        ("peak while generating images of the evaluation", "evaluation"),
        ("peak", "peak"),
        ("peak of sdtune sample", "sample"),
    ):
        if attribute in ("average", "class_images", "evaluation") and not getattr(memories[0], attribute):
            continue  # omit rows that do not apply
        table.append([name, *(f"{getattr(cost, attribute) / unit:.2f}" for cost in memories)])
    if fits is not None:
        table.append([f"fits {fits:g} GiB", *("yes" if cost.fits(fits) else "no" for cost in memories)])
    own = memory(costs, configured, accumulation, devices)
    lines += ["", *_aligned(table), "", f"these settings ({_names(configured)}): peak {_size(own.peak)}"]
    if fits is not None and not own.fits(fits):
        lines.append(_advice(costs, accumulation, devices, fits, configured, smaller))
    elif fits is not None:
        lines[-1] += f", fits {fits:g} GiB"
    return [*lines, "", *_NOTE]


def _names(configured: Switches) -> str:
    """Names of the memory-saving options that are on."""
    return ", ".join(name for name in _OVERRIDES if SWITCHES[name] | configured == configured) or "plain"


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
    return (
        f"does not fit: {_verdict(costs, accumulation, devices, fits).removeprefix('no: ')}; use another method:"
        " sdtune plan methods=all"
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
    smallest = min(memory(costs, switches, accumulation, devices).least for switches in SWITCHES.values())
    return f"no: needs at least {_size(smallest + ALLOWANCE)}"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 1024**2:.2f} MiB"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns, separated by two spaces: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
