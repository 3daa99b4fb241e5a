"""Which jobs of a sweep can share a backbone, from their configs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdtune.config.targets import resolve
from sdtune.methods import LoRA, TextualInversion
from sdtune.runs.compare import flat

_OWN = (
    *("method", "optimizer", "lr_schedule", "objective", "evaluation", "callbacks", "logger", "checkpoint", "data"),
    *("name", "seed", "trial", "new_tokens", "tokens_lr", "exports", "save_every", "optimized_metric", "default_lr"),
    *("resume", "trust", "paths", "trainer"),
)
"""Top-level keys that each run follows by itself, whatever its neighbours do."""

_SAME = (
    *("method._target_", "data.batch_size", "data.resolution", "trainer.max_steps", "trainer.accumulate_grad_batches"),
    *("trainer.benchmark", "trainer.deterministic", "trainer.inference_mode"),
)
"""Below those, what makes the samples of two runs fit into one batch, or holds for a whole process."""


@dataclass
class Group:
    """Jobs, by their place in the sweep's list, that go through one backbone; or one that cannot, with the reason."""

    jobs: list[int] = field(default_factory=list)
    alone: str | None = None


def groups(configs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Sort the resolved ``configs`` of a sweep's jobs, in their order."""
    found: dict[str, Group] = {}
    for number, config in enumerate(configs):
        reason = alone(config)
        key = f"{number}" if reason else json.dumps(_shared(config), sort_keys=True, default=str)
        found.setdefault(key, Group(alone=reason)).jobs.append(number)
    return list(found.values())


def widest(method: Mapping[str, Any]) -> int:
    """The largest rank that a job's pairs have anywhere, by its ``method`` node; 0 where it names none."""
    return max(int(node.get("rank", 0)) for node in (method, *(method.get("blocks") or {}).values()))


def largest(configs: Sequence[Mapping[str, Any]], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a job with all that any of ``configs`` has: a site that one opens is padded, and keeps activations,
    for each. Its optimizer is ``optimizer``.
    """
    first = configs[0]
    methods = [config["method"] for config in configs]
    method = dict(methods[0])
    if "rank" in method:
        method |= {"rank": max(map(widest, methods)), "blocks": None, "alpha_policy": "rank", "alpha": None}
        method |= {"weights": None, "dropout": max(float(each.get("dropout", 0)) for each in methods)}
        for key in ("targets", "projections"):
            if named := {one for each in methods for one in each.get(key) or ()}:
                method[key] = sorted(named)
    callbacks = [config["callbacks"] for config in configs]
    drawn = [each["samples"] for each in callbacks if each.get("samples")]
    own = {
        "samples": max(drawn, key=lambda samples: samples["sampling"]["batch_size"], default=None),
        "ema": next((each["ema"] for each in callbacks if each.get("ema")), None),
    }
    found = {**first, "method": method, "optimizer": optimizer, "callbacks": {**callbacks[0], **own}}
    for key in ("new_tokens", "tokens_lr"):
        if given := [config[key] for config in configs if config.get(key)]:
            found[key] = given[0]
    return found


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """A key in which two jobs differ that must have it in common to share; None where there is none."""
    here, there = _shared(one), _shared(other)
    return next((key for key in here if here[key] != there.get(key)), None)


def alone(config: Mapping[str, Any]) -> str | None:
    """Why a job can share its backbone with none."""
    method = resolve(str(config["method"]["_target_"]), "method", config.get("trust") or ())
    if getattr(method, "artifact_kind", None) not in ("lora", "words"):
        return f"method: {method.__name__} trains the backbone itself, or a net beside it"
    if method not in (LoRA, TextualInversion):
        return f"method: {method.__name__} may train more than LoRA's pairs and TextualInversion's words"
    if config["backbone"].get("from_scratch"):
        return "backbone.from_scratch: its weights are drawn from the job's own seed"
    if config["hardware"].get("offload"):
        return "hardware.offload: it would move what the others need"
    if config["trainer"].get("detect_anomaly"):
        return "trainer.detect_anomaly: one job's NaN would end them all"
    if int(config["hardware"].get("num_nodes", 1)) > 1:
        return "hardware.num_nodes: a group of jobs stays on one machine; give hardware.num_nodes=1"
    return None


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """What two jobs must have in common, by dotted key."""
    common = flat({key: value for key, value in config.items() if key not in _OWN})
    for key in _SAME:
        group, _, name = key.partition(".")
        common[key] = config[group].get(name)
    data = config["data"]
    named = data.get("class_prompt") is not None or data.get("class_path") is not None
    common["data.class_prompt"] = named and data.get("prior_weight", 1.0) > 0
    return common
