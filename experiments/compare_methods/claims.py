"""Common claims about each method, and their verification by the metrics of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from experiments.compare_methods.value import Value

SUBJECT_METHODS = ("textual_inversion", "lora", "dreambooth", "full")
METHODS = (*SUBJECT_METHODS, "controlnet")

LIKENESS, SUBJECT = 0.25, 0.6
"""Minimum ``subject_gain`` for a likeness of the subject, and for the subject itself."""

FREE = 0.85
"""Minimum ``background_accuracy`` at which prompts count as followed."""

LEAK = 0.10
"""Maximum ``prior_leak`` at which the class counts as preserved."""

FOLLOWED = 0.3
"""Minimum ``control_less_shuffled`` at which a control map counts as followed."""

Figures = Mapping[str, Mapping[str, Value]]
"""Metrics of each method, over the seeds."""

Verdict = bool | None
"""Whether a claim holds; None if the difference is within the noise."""


@dataclass(frozen=True)
class Asserted:
    """Common claims about a method: its resources, its effect and its use."""

    resources: str
    effect: str
    suits: str


ASSERTED = {
    "textual_inversion": Asserted("minimal", "medium", "one concept"),
    "lora": Asserted("low", "strong and flexible", "styles and characters"),
    "dreambooth": Asserted("medium", "very strong", "persons and pets"),
    "full": Asserted("very high", "remakes everything", "large data and new models"),
    "controlnet": Asserted("medium", "very strong structure", "poses and outlines"),
}


@dataclass(frozen=True)
class Claim:
    """Claim that metrics can contradict.

    Attributes:
        text: the claim.
        figures: names of the deciding metrics, shown next to the verdict.
        methods: methods whose metrics are shown.
        holds: function that computes the verdict.
    """

    text: str
    figures: tuple[str, ...]
    methods: tuple[str, ...]
    holds: Callable[[Figures], Verdict]


COSTS = ("trainable_parameters", "artifact_bytes", "peak_memory_bytes", "seconds")


def less(a: Value, b: Value) -> Verdict:
    """Whether ``a`` is less than ``b``; None if their intervals overlap."""
    if a.ends[1] < b.ends[0]:
        return True
    return None if a.ends[0] < b.ends[1] else False


def at_most(a: Value, limit: float) -> Verdict:
    """Whether ``a`` is at most ``limit``; None if its interval contains the limit."""
    return True if a.ends[1] <= limit else None if a.ends[0] <= limit else False


def at_least(a: Value, limit: float) -> Verdict:
    """Whether ``a`` is at least ``limit``; None if its interval contains the limit."""
    return True if a.ends[0] >= limit else None if a.ends[1] >= limit else False


def both(*verdicts: Verdict) -> Verdict:
    """Conjunction of verdicts: False if one is False, else None if one is None, else True."""
    return False if False in verdicts else None if None in verdicts else True


def _least(method: str, figure: str) -> Callable[[Figures], Verdict]:
    return lambda f: both(*(less(f[method][figure], f[other][figure]) for other in SUBJECT_METHODS if other != method))


def _most(method: str, figure: str) -> Callable[[Figures], Verdict]:
    return lambda f: both(*(less(f[other][figure], f[method][figure]) for other in SUBJECT_METHODS if other != method))


def _cheaper(method: str, *others: str) -> Callable[[Figures], Verdict]:
    return lambda f: both(*(less(f[method][cost], f[other][cost]) for cost in COSTS for other in others))


CLAIMS = (
    Claim(
        "Textual Inversion trains the fewest parameters and leaves the smallest file",
        ("trainable_parameters", "artifact_bytes"),
        SUBJECT_METHODS,
        lambda f: both(*(_least("textual_inversion", cost)(f) for cost in COSTS[:2])),
    ),
    Claim(
        "Textual Inversion needs the least memory",
        ("peak_memory_bytes",),
        SUBJECT_METHODS,
        _least("textual_inversion", "peak_memory_bytes"),
    ),
    Claim("Textual Inversion is done soonest", ("seconds",), SUBJECT_METHODS, _least("textual_inversion", "seconds")),
    Claim(
        "Textual Inversion's effect is the weakest of the four",
        ("subject_gain",),
        SUBJECT_METHODS,
        _least("textual_inversion", "subject_gain"),
    ),
    Claim(
        "DreamBooth needs less than full fine-tuning",
        COSTS,
        ("dreambooth", "full"),
        _cheaper("dreambooth", "full"),
    ),
    Claim(
        "DreamBooth's effect is stronger than LoRA's",
        ("subject_gain",),
        ("dreambooth", "lora"),
        lambda f: less(f["lora"]["subject_gain"], f["dreambooth"]["subject_gain"]),
    ),
    Claim(
        "DreamBooth keeps the class, full fine-tuning loses it",
        ("prior_leak", "class_diversity"),
        ("dreambooth", "full"),
        lambda f: both(at_most(f["dreambooth"]["prior_leak"], LEAK), at_least(f["full"]["prior_leak"], LEAK)),
    ),
    Claim(
        "LoRA needs less than DreamBooth and full fine-tuning",
        COSTS,
        ("lora", "dreambooth", "full"),
        _cheaper("lora", "dreambooth", "full"),
    ),
    Claim(
        "LoRA shows the subject and still follows the prompt",
        ("subject_gain", "background_accuracy"),
        ("lora",),
        lambda f: both(at_least(f["lora"]["subject_gain"], SUBJECT), at_least(f["lora"]["background_accuracy"], FREE)),
    ),
    Claim(
        "LoRA leaves the class alone",
        ("prior_leak", "prior_drift", "class_diversity"),
        ("lora",),
        lambda f: at_most(f["lora"]["prior_leak"], LEAK),
    ),
    Claim(
        "Full fine-tuning moves the model furthest",
        ("prior_drift",),
        SUBJECT_METHODS,
        _most("full", "prior_drift"),
    ),
    Claim(
        "ControlNet needs less than full fine-tuning",
        COSTS,
        ("controlnet", "full"),
        _cheaper("controlnet", "full"),
    ),
    Claim(
        "ControlNet gives the structure, and the prompt still counts",
        ("control_less_shuffled", "object_accuracy", "background_accuracy"),
        ("controlnet",),
        lambda f: both(
            at_least(f["controlnet"]["control_less_shuffled"], FOLLOWED),
            at_least(f["controlnet"]["background_accuracy"], FREE),
        ),
    ),
)


def suits(figures: Mapping[str, float]) -> str:
    """Use of a method with these mean metrics, by the thresholds of this module."""
    if "control_less_shuffled" in figures:
        follows = "a structure that a map gives" if figures["control_less_shuffled"] >= FOLLOWED else "nothing yet"
        return follows + _prompts(figures)
    gain = figures["subject_gain"]
    shown = "the subject itself" if gain >= SUBJECT else "a likeness of the subject" if gain >= LIKENESS else "nothing"
    kept = "its class kept" if figures["prior_leak"] <= LEAK else "its class lost"
    return f"{shown}, {kept}" + _prompts(figures)


def _prompts(figures: Mapping[str, float]) -> str:
    return "" if figures["background_accuracy"] >= FREE else ", prompts hardly followed"
