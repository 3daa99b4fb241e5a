"""Tables of the comparison, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.compare_methods.claims import (
    ASSERTED,
    CLAIMS,
    COSTS,
    FOLLOWED,
    FREE,
    LEAK,
    LIKENESS,
    SUBJECT,
    SUBJECT_METHODS,
    suits,
)
from experiments.compare_methods.value import Value
from sdtune.runs.metrics import unit

_EFFECT = (
    "subject_gain", "background_accuracy", "clip_image", "clip_text", "diversity", "memorisation", "prior_leak",
    "prior_drift", "class_diversity", "validation_loss",
)  # fmt: skip
_STRUCTURE = ("control_agreement", "control_agreement_shuffled", "control_less_shuffled", "object_accuracy",
              "background_accuracy", "validation_loss")  # fmt: skip
_COSTS = (*COSTS, "seconds_to_best")


def page(metrics: Mapping[str, Mapping[str, Value]], plans: Mapping[str, Mapping[str, float]], seeds: int) -> list[str]:
    """Lines of the generated section of README.md."""
    means = {method: {key: value.mean for key, value in values.items()} for method, values in metrics.items()}
    lines = [f"Results over {seeds} seed{'s' if seeds > 1 else ''}:", ""]
    lines += _table(
        ["method", "resources, said", "measured", "effect, said", "measured", "suits, said", "measured"],
        [
            [method, said.resources, _resources(metrics[method]), said.effect, _effect(metrics[method]), said.suits,
             suits(means[method])]
            for method, said in ASSERTED.items()
        ],
    )  # fmt: skip
    lines += ["", "Measured resources:", ""]
    lines += _figures(metrics, _COSTS)
    lines += [
        "",
        "Planned resources for Stable Diffusion 1.5 at 512x512, from `sdtune plan experiment=sd15_...`:",
        "",
    ]
    lines += _table(
        ["method", "trained parameters", "artifact", "peak a device", "TFLOP a step", "steps"],
        [
            [
                f"[{method}](../sd15_{method}.yaml)",
                *(unit(plan[key], key) for key in ("trainable_parameters", "artifact_bytes", "peak_memory_bytes")),
                f"{plan['tflop']:.2f}",
                f"{plan['steps']:,}",
            ]
            for method, plan in plans.items()
        ],
    )
    lines += ["", "Effect on the subject and on its class:", ""]
    lines += _figures({method: metrics[method] for method in SUBJECT_METHODS}, _EFFECT)
    lines += ["", "Effect of a control map, on separate scenes:", ""]
    lines += _figures({"controlnet": metrics["controlnet"]}, _STRUCTURE)
    lines += [
        "",
        "Common claims (*saying*), and whether they hold in these metrics (*here*). A `subject_gain` of at least",
        f"{SUBJECT:g} counts as the subject itself, at least {LIKENESS:g} as a likeness. Prompts count as followed",
        f"from a `background_accuracy` of {FREE:g}, a class counts as kept up to a `prior_leak` of {LEAK:g}, and a map",
        f"counts as followed from a `control_less_shuffled` of {FOLLOWED:g}. *within the noise*: the intervals (or",
        "standard deviations) overlap.",
        "",
    ]
    lines += _table(
        ["saying", "here", "by"],
        [
            [
                claim.text,
                _VERDICTS[claim.holds(metrics)],
                "; ".join(
                    f"{figure}: " + ", ".join(f"{m} {metrics[m][figure].shown(figure)}" for m in claim.methods)
                    for figure in claim.figures
                ),
            ]
            for claim in CLAIMS
        ],
    )
    return lines


_VERDICTS = {True: "so", False: "**not so**", None: "within the noise"}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _figures(metrics: Mapping[str, Mapping[str, Value]], keys: Sequence[str]) -> list[str]:
    shown = [key for key in keys if any(key in values for values in metrics.values())]
    cells = {m: [v[key].shown(key) if key in v else "" for key in shown] for m, v in metrics.items()}
    return _table(["method", *shown], [[method, *row] for method, row in cells.items()])


def _resources(values: Mapping[str, Value]) -> str:
    parts = {key: values[key].shown(key) for key in COSTS}
    return (
        f"{parts['trainable_parameters']} parameters; file {parts['artifact_bytes']}; memory"
        f" {parts['peak_memory_bytes']}; {parts['seconds']}"
    )


def _effect(values: Mapping[str, Value]) -> str:
    if "control_less_shuffled" in values:
        return f"map followed: {values['control_less_shuffled'].shown('')} above another's map"
    return f"subject_gain {values['subject_gain'].shown('')}; prior_leak {values['prior_leak'].shown('')}"
