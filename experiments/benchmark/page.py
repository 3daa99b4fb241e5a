"""README.md of the benchmark, generated from results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

AIMS = {
    "pocket": dict.fromkeys(("lora", "textual_inversion", "dreambooth", "full", "controlnet"), 0.5),
    "sd15": {"lora": 0.55, "textual_inversion": 0.55, "dreambooth": 0.62, "full": 0.62, "controlnet": 0.62},
}
"""Maximum step time relative to diffusers' documented default."""

BEST_AIM, PEAK_AIM, FLOOR_AIM, KOHYA_AIM = 0.9, 0.7, 0.4, 0.7
COLD_AIM, WARM_AIM = 1.1, 1.0
"""Maximum time to the first step relative to diffusers', with empty and with filled caches."""

LOOP_AIMS, WALL_AIM = {1: 0.20, 4: 0.32}, 0.35
DEFAULT, WARM, KOHYA = "diffusers", "sdtune, warm caches", "kohya's train_network.py"


def page(results: Mapping[str, Any]) -> str:
    """Complete page; groups without results are omitted."""
    if not results:
        return "# Speed and memory\n\nNothing has been measured yet; `make bench` measures and writes this page.\n"
    results = {name: results[name] for name in groups(_precisions(results)) if name in results}
    lines = ["# Speed and memory", "", *_intro(results)]
    for shape, title in (
        ("pocket", "On pocket (64x64)"),
        ("sd15", "At SD 1.5's true shapes, random weights (256x256)"),
    ):
        shape_groups = {name: group for name, group in results.items() if name.startswith(f"{shape}/")}
        if shape_groups:
            lines += ["", f"## {title}", "", *_steps(shape, shape_groups), "", *_work(shape_groups)]
    for name, group in results.items():
        if name.startswith("floor/"):
            lines += ["", _floor(name, group)]
    sweeps = {name: value for name, value in results.items() if name.startswith("sweep/")}
    if sweeps:
        lines += ["", "## A sweep of eight runs: LoRA on pocket, 4 ranks and 2 learning rates", "", *_sweeps(sweeps)]
    return "\n".join([*lines, *_reasons(results), ""])


def _reasons(results: Mapping[str, Any]) -> list[str]:
    """Reasons why some aims are missed."""
    if "imports" not in results:
        return []
    seconds = [f"{name} {median(values):.1f}" for name, values in results["imports"]["seconds"].items()]
    return [
        "",
        "## Why some aims are missed",
        "",
        "- *Step*: both trainers need the same time for arithmetic and for reading weights. sdtune saves the VAE and",
        "  the text encoder (caches), the losses of torch's convolutions at the lowest resolutions and, if many",
        "  parameters are trained, new memory pages for gradients in each step. In float32 a larger fraction of the",
        "  step is arithmetic (see the matrix rate). On pocket both trainers start thousands of small operators, and",
        "  the encoders are small. Without caches, sdtune's VAE encodes in float32 and that of diffusers' scripts in",
        "  bfloat16: some VAE encoders are inexact in half precision.",
        "- *Start*: the caches, because all images are encoded before the first step (see the row without caches), and",
        "  the imports. Import time in seconds, each including the previous ones: " + ", ".join(seconds[:2]) + ",",
        "  " + ", ".join(seconds[2:]) + ". diffusers' scripts",
        "  do not import Lightning, which imports torch's compiler and torchmetrics. Caches that are filled already",
        "  leave the imports.",
        "- *Peak*: if few parameters are trained in float32, the peak occurs while the UNet is loaded, when memory",
        "  holds both its file and its tensors. If many are trained, gradients and AdamW's moments cause the peak,",
        "  and sdtune keeps memory that a step frees for the next step. The rest is the same in diffusers. On",
        "  pocket, whose weights have 64 MB, the libraries cause the peak.",
        "- *Sweep*: the arithmetic of the base model for eight times the samples, which soon occupies two cores; the",
        "  products of the LoRA pairs, which are hundreds of small ones; and the separate work of each run (optimizer,",
        "  clipping, log), which is done eight times, one run after another.",
    ]


def _intro(results: Mapping[str, Any]) -> list[str]:
    lines = [
        "`make bench` measures the groups that are missing in results.json on the CPU, saves them there and",
        "generates this page from it. It needs two to three hours, 20 GB of memory and no downloaded weights (it",
        "uses pocket, and random weights in SD 1.5's shapes). On another machine, remove results.json first.",
        "`PEER=CHECKOUT` sets a checkout of diffusers, whose example scripts are then measured too, and",
        "`KOHYA=CHECKOUT` one of kohya's sd-scripts. `BENCH=sweep/4` measures only the groups whose names start with",
        "`sweep/4`. Nothing on this page was measured on a GPU.",
        "",
        "Each metric is the median of three new processes, which alternate with those of the other variants; the",
        "minimum and the maximum are in parentheses. Unless stated otherwise: batch size 1, eight images, AdamW,",
        "constant learning rate, LoRA rank 4. The VAE and text encoder caches are empty at the start, and the time to",
        "fill them is part of the time to the first step, except for *warm caches*: the caches of the run before. The",
        "peak is that of the entire process. *of diffusers*: the metric divided by that of diffusers' example script;",
        "less than 1 means less time or memory. *matrix rate*: FLOP/s of a step, relative to the rate that the same",
        "cores reach in a product of two square matrices. *aim*: the target ratio.",
        "",
        *_machines(results),
    ]
    missing = [name for name in groups(_precisions(results)) if name not in results]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    earlier = [name for name, value in results.items() if "earlier" in value]
    if earlier:
        changes = ", ".join(sorted({results[name]["earlier"] for name in earlier}))
        lines += ["", f"Measured before {changes}, and not repeated since: {', '.join(earlier)}."]
    if "gate" in results:
        worst = max(v for k, method in results["gate"].items() if k not in NOT_VARIANTS for v in method.values())
        lines += [
            "",
            "With the same noise and timesteps, the losses and gradients of all five methods equal those of plain",
            f"diffusers within {worst:.0e} of each tensor's norm (pocket, float32).",
        ]
    return lines


def groups(precisions: Sequence[str]) -> list[str]:
    """Names of all groups, in order; a group is measured on one machine, and ratios are computed within it."""
    names = [*(f"{shape}/{method}" for shape, methods in AIMS.items() for method in methods), "floor/lora"]
    names += [f"sweep/{batch}" for batch in LOOP_AIMS]
    return ["imports", "gate", *(f"{name}/{precision}" for name in names for precision in precisions)]


def _precisions(results: Mapping[str, Any]) -> list[str]:
    """32-true, and bf16-mixed if a group was measured with it."""
    return [p for p in ("32-true", "bf16-mixed") if p == "32-true" or any(name.endswith(p) for name in results)]


def _machines(results: Mapping[str, Any]) -> list[str]:
    """Description of the machine, or of each of several machines with the groups that were measured on it."""
    groups_by_machine: dict[str, list[str]] = {}
    for name, value in results.items():
        m = value["machine"]
        bfloat16 = f"bfloat16 by {', '.join(m['multiplies bfloat16'])}" if m["multiplies bfloat16"] else NO_HALF
        machine = f"{m['processor']}, {m['cores']} cores, torch {m['torch']}, diffusers {m['diffusers']}, {bfloat16}"
        groups_by_machine.setdefault(machine, []).append(name)
    if len(groups_by_machine) == 1:
        return ["The ratios are valid for the machine that they were measured on:", f"{next(iter(groups_by_machine))}."]
    return [
        "Each group was measured on one machine, and its ratios are valid for that machine:",
        "",
        *(f"- {machine}: {', '.join(names)}." for machine, names in groups_by_machine.items()),
    ]


NO_HALF = "no native bfloat16, so that bf16-mixed was not measured"


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
            fraction = _fraction(figures, group["rate"])
            lines.append(
                f"| {method} | {precision} | {variant} | {_spread(figures['step_seconds'], 1000)} | {ratios[0]}"
                f" | {_spread(figures['first_step_seconds'], 1, 1)} | {ratios[1]}"
                f" | {_spread(figures['peak'], 1 / 1024**2)} | {ratios[2]} | {fraction:.0%} |"
            )
    notes = ["", *NOTES] if any(DEFAULT in group for group in groups.values()) else []
    failed = [(name, *failure) for name, group in groups.items() for failure in group.get("does not run", {}).items()]
    for name, variant, error in failed:
        _, method, precision = name.split("/")
        notes += [
            "",
            f"Not compared: {variant}, because the script for {method} fails here in {precision} (`{error}`).",
        ]
    return [*lines, *notes, "", *_aims(shape, groups)]


NOTES = (
    "The side of pocket's latents is a quarter of the image side, which diffusers' ControlNet script does not support.",
    "*diffusers*: its scripts with the flags of their READMEs; full fine-tuning has `--gradient_checkpointing`.",
    "*diffusers, best flags*: the flags that should be fastest on a CPU; full fine-tuning without that flag,",
    "DreamBooth with `--pre_compute_text_embeddings --set_grads_to_none`, ControlNet with `--set_grads_to_none`.",
    "Most of their scalar synchronizations are AdamW's step counters, one per tensor, which stay on the CPU in a",
    "training on a GPU.",
)


def _aims(shape: str, groups: Mapping[str, Any]) -> list[str]:
    """Table of ratios and aims of each group, and of the steps after which sdtune is ahead despite a later start."""
    lines = [
        f"| method | precision | step | aim | step, faster flags (aim {BEST_AIM}) | start (aim {COLD_AIM}) |"
        f" start, warm caches (aim {WARM_AIM}) | peak (aim {PEAK_AIM}) | ahead after, steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        if DEFAULT not in group:  # the notes give the reason
            continue
        _, method, precision = name.split("/")
        ours, theirs = group["sdtune"], group[DEFAULT]
        aim = AIMS[shape][method]
        # The best flags are not always faster.
        faster = min(
            (group[v] for v in (DEFAULT, f"{DEFAULT}, best flags") if v in group),
            key=lambda v: median(v["step_seconds"]),
        )
        cells = [
            _met(ours, theirs, "step_seconds", aim), f"{aim}", _met(ours, faster, "step_seconds", BEST_AIM),
            _met(ours, theirs, "first_step_seconds", COLD_AIM),
            _met(group[WARM], theirs, "first_step_seconds", WARM_AIM) if WARM in group else "",
            _met(ours, theirs, "peak", PEAK_AIM), ahead(ours, theirs),
        ]  # fmt: skip
        lines.append(f"| {method} | {precision} | {' | '.join(cells)} |")
    if len(lines) > 2:
        intro = "Ratios and aims. *faster flags*: the faster of diffusers' two variants; *ahead*: number of steps after"
        return [intro, "which sdtune is ahead despite a later start.", "", *lines, *_kohya(groups)]
    if any("does not run" in group for group in groups.values()):
        return []
    return ["diffusers' scripts were not measured; `make bench PEER=CHECKOUT` measures them."]


def _kohya(groups: Mapping[str, Any]) -> list[str]:
    """Comparison with kohya's script in each group that has it."""
    compared = {name: group for name, group in groups.items() if KOHYA in group}
    if not compared:
        return []
    lines = [f"| method | precision | step of {KOHYA} (aim {KOHYA_AIM}) | start | start, warm caches | peak |"]
    lines.append("|---|---|---|---|---|---|")
    for name, group in compared.items():
        _, method, precision = name.split("/")
        ratios = [
            f"{median(group[variant][key]) / median(group[KOHYA][key]):.2f}"
            for variant, key in (("sdtune", "first_step_seconds"), (WARM, "first_step_seconds"), ("sdtune", "peak"))
        ]
        step = _met(group["sdtune"], group[KOHYA], "step_seconds", KOHYA_AIM)
        lines.append(f"| {method} | {precision} | {step} | {' | '.join(ratios)} |")
    notes = (
        f"sdtune's figures divided by those of {KOHYA}: LoRA of the UNet with cached latents, AdamW, in an environment",
        "with the versions that its requirements name, except torch. It computes the text embeddings in each step.",
    )
    return ["", *notes, "", *lines]


def _met(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str, aim: float) -> str:
    ratio = median(ours[key]) / median(theirs[key])
    return f"{ratio:.2f} {'missed' if ratio > aim else 'met'}"


def ahead(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Number of steps after which (or until which) the first trainer is ahead of the second, as text."""
    later = median(ours["first_step_seconds"]) - median(theirs["first_step_seconds"])
    saved = median(theirs["step_seconds"]) - median(ours["step_seconds"])
    if later <= 0:
        return "at once" if saved >= 0 else f"until {later / saved:.0f}"
    return f"{later / saved:.0f}" if saved > 0 else "never"


def _floor(name: str, group: Mapping[str, Any]) -> str:
    precision = name.rpartition("/")[2]
    ours = group["sdtune"]
    fraction = _fraction(ours, group["rate"])
    return (
        f"At batch size 4, a LoRA step takes {_spread(ours['step_seconds'], 1, 1)} s in {precision}: {fraction:.0%} of"
        f" the matrix rate, which was {group['rate']:.2f} TFLOP/s on the same cores in the same run"
        f" (aim {FLOOR_AIM:.0%})."
    )


def _fraction(figures: Mapping[str, Any], rate: float) -> float:
    """TFLOP/s of a step as a fraction of ``rate``."""
    return float(figures["flop"] / 1e12 / (median(figures["step_seconds"]) * rate))


def _work(groups: Mapping[str, Any]) -> list[str]:
    lines = [
        "Work of one optimizer step:",
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
    differences = []
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
        differences.append(f"{group['largest difference']:.0e} (batch {batch}, {precision})")
    return [
        "`experiment=lora_subject` with LoRA on attention layers only, ranks 4, 8, 16, 32 and learning rates 1e-3,",
        "1e-4; 60 steps each, no previews, no evaluation. *Loop*: time of the optimizer steps of all eight jobs,",
        "from the median step times of the runs (half of the sum for two processes at once); *wall*: time of the",
        "complete command.",
        "",
        *lines,
        "",
        "Largest difference of a tensor, relative to its norm, between a LoRA trained on the shared backbone and the",
        f"same LoRA trained alone: {', '.join(differences)}.",
        "tests/shared_backbone limits it after 20 steps to 1e-4 in float32, and in bfloat16 to twice the difference",
        "that another split of the same batch causes.",
    ]


NOT_VARIANTS = ("machine", "rate", "does not run", "earlier")
"""``earlier`` is written by hand if a later version changes the result; a new measurement removes it."""


def _variants(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in NOT_VARIANTS}


def _spread(values: list[float], scale: float, digits: int = 0) -> str:
    center, low, high = (f"{scale * v:,.{digits}f}" for v in (median(values), min(values), max(values)))
    return f"{center} ({low}-{high})"
