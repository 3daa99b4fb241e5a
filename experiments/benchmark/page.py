"""README.md of the benchmark, from results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

AIMS = {
    "pocket": dict.fromkeys(("lora", "textual_inversion", "dreambooth", "full", "controlnet"), 0.5),
    "sd15": {"lora": 0.55, "textual_inversion": 0.55, "dreambooth": 0.62, "full": 0.62, "controlnet": 0.62},
}
"""Step time over that of diffusers' documented default, at most."""

BEST_AIM, START_AIM, PEAK_AIM, FLOOR_AIM = 0.9, 0.5, 0.7, 0.4
LOOP_AIMS, WALL_AIM = {1: 0.20, 4: 0.32}, 0.35
DEFAULT = "diffusers"


def page(found: Mapping[str, Any]) -> str:
    """The whole page; a group that has not been measured is left out."""
    if not found:
        return "# How fast it is\n\nNothing has been measured yet; `make bench` does it and writes this page.\n"
    found = {name: found[name] for name in groups(_precisions(found)) if name in found}  # in whatever order measured
    lines = ["# How fast it is", "", *_intro(found)]
    for shape, title in (
        ("pocket", "On pocket (64x64)"),
        ("sd15", "At SD 1.5's true shapes, random weights (256x256)"),
    ):
        of = {name: value for name, value in found.items() if name.startswith(f"{shape}/")}
        if of:
            lines += ["", f"## {title}", "", *_steps(shape, of), "", *_work(of)]
    for name, group in found.items():
        if name.startswith("floor/"):
            lines += ["", _floor(name, group)]
    sweeps = {name: value for name, value in found.items() if name.startswith("sweep/")}
    if sweeps:
        lines += ["", "## A sweep of eight: 4 ranks by 2 rates, LoRA on pocket", "", *_sweeps(sweeps)]
    return "\n".join([*lines, *_why(found), ""])


def _why(found: Mapping[str, Any]) -> list[str]:
    """What holds the aims back that are missed."""
    if "imports" not in found:
        return []
    seconds = [f"{name} {median(each):.1f}" for name, each in found["imports"]["seconds"].items()]
    return [
        "",
        "## What holds the missed aims back",
        "",
        "- *Step*: arithmetic, and weights to be read, of both alike. What is saved is the VAE and the text encoder",
        "  (caches), what torch's convolutions lose at the lowest resolutions, and, where much is trained, new pages",
        "  for gradients in each step. In float32 the arithmetic is a larger share (see the matrix rate), on pocket",
        "  the small operators that both send out by the thousand, and there the encoders are small.",
        "- *Start*: the caches, which encode every image before the first step (the row without them has the rest),",
        "  and imports. In seconds, each with those before it: " + ", ".join(seconds[:2]) + ",",
        "  " + ", ".join(seconds[2:]) + ". diffusers' scripts",
        "  have no Lightning, which imports torch's compiler and torchmetrics.",
        "- *Peak*: where little is trained in float32, it is reached while the UNet is read, and its file lies in",
        "  memory beside what is made of it; where much is, by gradients and AdamW's moments, and here what a step",
        "  frees stays for the next one. diffusers has the rest alike. On pocket, whose weights are 64 MB, it is the",
        "  libraries'.",
        "- *Sweep*: the base's arithmetic over eight times the samples, which two cores are soon busy with; the",
        "  pairs' products, hundreds of small ones; and what each run does by itself (its optimizer, clipping, log),",
        "  which is eight times that of one, and is done one after another.",
    ]


def _intro(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "`make bench` measures what results.json lacks, on the CPU, keeps it there and writes this page from it. It",
        "takes two to three hours, 20 GB of memory and no weights (pocket's, and random ones of SD 1.5's shapes). For",
        "another machine remove results.json; `PEER=CHECKOUT` names a checkout of diffusers, whose example scripts",
        "are then timed too; `BENCH=sweep/4` measures the groups whose names begin so. Nothing here was measured on",
        "a GPU.",
        "",
        "Each metric is the median of three fresh processes that took turns with those beside it, and in brackets the",
        "least and the most. Batch 1 unless it says otherwise, eight images, AdamW, a constant rate, LoRA of rank 4.",
        "The caches of VAE and text encoder begin empty, and to fill them is part of the time to the first step; the",
        "peak is the whole process's. *of diffusers*: sdtune's metric over that of diffusers' example script; less",
        "than 1 is less time or memory. *matrix rate*: a step's arithmetic over what the same cores reach with two",
        "square matrices. *aim*: the ratio that sdtune set itself before it was built. Other trainers are not",
        "compared.",
        "",
        *_machines(found),
    ]
    missing = [name for name in groups(_precisions(found)) if name not in found]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    earlier = [name for name, value in found.items() if "earlier" in value]
    if earlier:
        whys = ", ".join(sorted({found[name]["earlier"] for name in earlier}))
        lines += ["", f"Measured before {whys}, and not repeated since: {', '.join(earlier)}."]
    if "gate" in found:
        worst = max(v for k, of in found["gate"].items() if k not in NOT_VARIANTS for v in of.values())
        lines += [
            "",
            "With the same noise and timesteps, the losses and gradients of all five methods are those of plain",
            f"diffusers within {worst:.0e} of each tensor's norm (pocket, float32).",
        ]
    return lines


def groups(precisions: Sequence[str]) -> list[str]:
    """The names of what a benchmark measures, in order; ratios are within a group, which one machine measures."""
    of = [*(f"{shape}/{method}" for shape, methods in AIMS.items() for method in methods), "floor/lora"]
    of += [f"sweep/{batch}" for batch in LOOP_AIMS]
    return ["imports", "gate", *(f"{name}/{precision}" for name in of for precision in precisions)]


def _precisions(found: Mapping[str, Any]) -> list[str]:
    """bfloat16 where the benchmark began with it."""
    return [p for p in ("32-true", "bf16-mixed") if p == "32-true" or any(name.endswith(p) for name in found)]


def _machines(found: Mapping[str, Any]) -> list[str]:
    """The machine that the metrics are from, or each of several with the groups that were measured on it."""
    of: dict[str, list[str]] = {}
    for name, value in found.items():
        m = value["machine"]
        half = f"bfloat16 by {', '.join(m['multiplies bfloat16'])}" if m["multiplies bfloat16"] else NO_HALF
        machine = f"{m['processor']}, {m['cores']} cores, torch {m['torch']}, diffusers {m['diffusers']}, {half}"
        of.setdefault(machine, []).append(name)
    if len(of) == 1:
        return ["Ratios hold for the machine that they were measured on:", f"{next(iter(of))}."]
    return [
        "Each group was measured to its end on one machine, and its ratios hold for that one:",
        "",
        *(f"- {machine}: {', '.join(names)}." for machine, names in of.items()),
    ]


NO_HALF = "which does not multiply bfloat16 itself, so that bf16-mixed was not timed"


def _steps(shape: str, groups: Mapping[str, Any]) -> list[str]:
    lines = [
        "| method | precision | variant | step, ms | of diffusers | to first step, s | of diffusers | peak, MiB |"
        " of diffusers | of the matrix rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        _, method, precision = name.split("/")
        base = group.get(DEFAULT)
        for variant, figures in _variants(group).items():
            ratios = [
                f"{median(figures[key]) / median(base[key]):.2f}" if base and variant != DEFAULT else ""
                for key in ("step_seconds", "first_step_seconds", "peak")
            ]
            floor = _share(figures, group["rate"])
            lines.append(
                f"| {method} | {precision} | {variant} | {_spread(figures['step_seconds'], 1000)} | {ratios[0]}"
                f" | {_spread(figures['first_step_seconds'], 1, 1)} | {ratios[1]}"
                f" | {_spread(figures['peak'], 1 / 1024**2)} | {ratios[2]} | {floor:.0%} |"
            )
    notes = ["", *NOTES] if any(DEFAULT in group for group in groups.values()) else []
    failed = [(name, *each) for name, group in groups.items() for each in group.get("does not run", {}).items()]
    for name, variant, why in failed:
        _, method, precision = name.split("/")
        notes += [
            "",
            f"Not compared: {variant}, whose script for {method} gives no metrics here in {precision} (`{why}`).",
        ]
    return [*lines, *notes, "", *_aims(shape, groups)]


NOTES = (
    "Pocket's latents are a quarter as wide as its images, which diffusers' ControlNet script cannot be told.",
    "*diffusers* is its scripts as their READMEs call them: for the whole UNet with `--gradient_checkpointing`.",
    "*diffusers, best flags* is what ought to be fastest on a CPU: the whole UNet without that, DreamBooth with",
    "`--pre_compute_text_embeddings --set_grads_to_none`, ControlNet with `--set_grads_to_none`. Of their scalar",
    "synchronisations most are AdamW's counters, one a tensor, which on a GPU stay on the CPU.",
)


def _aims(shape: str, groups: Mapping[str, Any]) -> list[str]:
    """A row for each group: its ratios against what they should be, and when a later start is made up for."""
    lines = [
        f"| method | precision | step | aim | step, faster flags (aim {BEST_AIM}) | start (aim {START_AIM}) |"
        f" peak (aim {PEAK_AIM}) | ahead after, steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        if DEFAULT not in group:  # the reason stands above
            continue
        _, method, precision = name.split("/")
        ours, theirs = group["sdtune"], group[DEFAULT]
        aim = AIMS[shape][method]
        # Flags that are meant to be faster are not always.
        faster = min(
            (group[v] for v in (DEFAULT, f"{DEFAULT}, best flags") if v in group),
            key=lambda v: median(v["step_seconds"]),
        )
        cells = [
            _met(ours, theirs, "step_seconds", aim), f"{aim}", _met(ours, faster, "step_seconds", BEST_AIM),
            _met(ours, theirs, "first_step_seconds", START_AIM), _met(ours, theirs, "peak", PEAK_AIM),
            ahead(ours, theirs),
        ]  # fmt: skip
        lines.append(f"| {method} | {precision} | {' | '.join(cells)} |")
    if len(lines) > 2:
        said = (
            "Ratios against aims; *faster flags* are those of diffusers that turned out faster; *ahead*: after how many"
        )
        return [said, "steps a later start is made up for.", "", *lines]
    if any("does not run" in group for group in groups.values()):
        return []
    return ["diffusers' scripts were not timed; `make bench PEER=CHECKOUT` does."]


def _met(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str, aim: float) -> str:
    ratio = median(ours[key]) / median(theirs[key])
    return f"{ratio:.2f} {'missed' if ratio > aim else 'met'}"


def ahead(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    later = median(ours["first_step_seconds"]) - median(theirs["first_step_seconds"])
    saved = median(theirs["step_seconds"]) - median(ours["step_seconds"])
    if later <= 0:
        return "at once" if saved >= 0 else f"until {later / saved:.0f}"
    return f"{later / saved:.0f}" if saved > 0 else "never"


def _floor(name: str, group: Mapping[str, Any]) -> str:
    precision = name.rpartition("/")[2]
    ours = group["sdtune"]
    share = _share(ours, group["rate"])
    return (
        f"At batch 4 a LoRA's step takes {_spread(ours['step_seconds'], 1, 1)} s in {precision}: {share:.0%} of the"
        f" matrix rate, which was {group['rate']:.2f} TFLOP/s on the same cores in the same run (aim {FLOOR_AIM:.0%})."
    )


def _share(figures: Mapping[str, Any], rate: float) -> float:
    """What a step's arithmetic, in TFLOP/s, is of ``rate``."""
    return float(figures["flop"] / 1e12 / (median(figures["step_seconds"]) * rate))


def _work(groups: Mapping[str, Any]) -> list[str]:
    lines = [
        "What one optimizer step does:",
        "",
        "| method | precision | variant | operators | scalar synchronisations | TFLOP |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        _, method, precision = name.split("/")
        for variant, figures in _variants(group).items():
            lines.append(
                f"| {method} | {precision} | {variant} | {figures['operators']:,} | {figures['synchronisations']}"
                f" | {figures['flop'] / 1e12:.3f} |"
            )
    return lines


def _sweeps(groups: Mapping[str, Any]) -> list[str]:
    lines = [
        "| batch | precision | way | loop, s | ratio | aim | wall, s | ratio | aim |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    apart = []
    for name, group in groups.items():
        _, batch, precision = name.split("/")
        base = group["one after another"]
        for way in ("one after another", "two processes at once", "shared backbone"):
            loop, wall = (median(group[way][key]) / median(base[key]) for key in ("loop_seconds", "wall_seconds"))
            shared = way == "shared backbone"
            lines.append(
                f"| {batch} | {precision} | {way} | {_spread(group[way]['loop_seconds'], 1, 1)} | {loop:.2f}"
                f" | {LOOP_AIMS[int(batch)] if shared else ''} | {_spread(group[way]['wall_seconds'], 1, 1)}"
                f" | {wall:.2f} | {WALL_AIM if shared and batch == '4' else ''} |"
            )
        apart.append(f"{group['largest difference']:.0e} (batch {batch}, {precision})")
    return [
        "`experiment=lora_subject`, pairs on attention alone, ranks 4, 8, 16, 32 by rates 1e-3, 1e-4; 60 steps each,",
        "no previews, no evaluation. *Loop*: the time that the optimizer steps of all eight jobs take, from the runs'",
        "own median steps (of two processes at once half the sum); *wall*: that of the whole command.",
        "",
        *lines,
        "",
        "A LoRA trained on the shared backbone against the same one trained alone: the largest difference of a tensor,",
        f"of its norm, is {', '.join(apart)}.",
        "tests/shared_backbone holds it after 20 steps to 1e-4 in float32, and in bfloat16 to twice what another split",
        "of the same batch makes.",
    ]


NOT_VARIANTS = ("machine", "rate", "does not run", "earlier")
"""``earlier``: written by hand where a later version is known to be another, and gone when it is measured anew."""


def _variants(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in NOT_VARIANTS}


def _spread(values: list[float], scale: float, digits: int = 0) -> str:
    middle, least, most = (f"{scale * v:,.{digits}f}" for v in (median(values), min(values), max(values)))
    return f"{middle} ({least}-{most})"
