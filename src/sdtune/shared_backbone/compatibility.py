"""Decide from their configs which jobs of a sweep can share a backbone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from sdtune.backbone.families import T5, Family, LoRAProjection
from sdtune.config.targets import resolve
from sdtune.formats import largest_rank_in_file
from sdtune.methods import LoRA, TextualInversion
from sdtune.methods.lora import DEFAULT_RANK
from sdtune.runs.compare import flat

_PER_RUN = (
    *("method", "optimizer", "lr_schedule", "objective", "evaluation", "callbacks", "logger", "checkpoint", "data"),
    *("name", "seed", "trial", "new_tokens", "tokens_lr", "exports", "save_every", "optimized_metric", "default_lr"),
    *("resume", "trust", "paths", "trainer"),
)
"""Top-level keys that may differ between runs on one backbone."""

_COMMON = (
    *("method._target_", "data.batch_size", "data.resolution", "trainer.max_steps", "trainer.accumulate_grad_batches"),
    *("trainer.epochs", "trainer.benchmark", "trainer.deterministic", "trainer.inference_mode"),
)
"""Keys below those that must be equal: samples of two runs must fit into one batch, or the setting is per process."""


@dataclass
class Group:
    """Jobs that share a backbone, by index in the sweep; or one job that cannot, with the reason in ``alone``."""

    jobs: list[int] = field(default_factory=list)
    alone: str | None = None


def groups(configs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Group the jobs of a sweep by their resolved ``configs``; the order is kept."""
    groups_by_key: dict[str, Group] = {}
    for number, config in enumerate(configs):
        reason = alone(config)
        key = f"{number}" if reason else json.dumps(_shared(config), sort_keys=True, default=str)
        groups_by_key.setdefault(key, Group(alone=reason)).jobs.append(number)
    return list(groups_by_key.values())


def largest_rank(method: Mapping[str, Any]) -> int:
    """Largest LoRA rank in a ``method`` node, including its ``blocks``; 0 for another method.

    Raises:
        UserError: ``method.weights`` sets the rank and cannot be read.
    """
    if "rank" not in method:
        return 0
    ranks = [block.get("rank") for block in (method.get("blocks") or {}).values()]
    if method["rank"] is None and method.get("weights"):
        ranks.append(largest_rank_in_file(Path(method["weights"]).expanduser()))
    else:
        ranks.append(method["rank"] or DEFAULT_RANK)
    return max(map(int, ranks))


def largest_config(
    configs: Sequence[Mapping[str, Any]], optimizer: Mapping[str, Any], family: Family
) -> dict[str, Any]:
    """Config of a job that costs as much as any job of ``configs`` can, with ``optimizer``, on a model of ``family``.

    It trains every layer that any job trains: in the shared backbone, that layer stores activations for each run. A job
    with the layers of a LoRA file counts as one with all targets, without layers such as ``time_emb_proj``.
    """
    first = configs[0]
    methods = [config["method"] for config in configs]
    method = dict(methods[0])
    if "rank" in method:
        method |= {"rank": max(map(largest_rank, methods)), "blocks": None, "alpha_policy": "rank", "alpha": None}
        method |= {"weights": None, "dropout": max(float(node.get("dropout", 0)) for node in methods)}
        method["targets"] = sorted({name for node in methods for name in _targets(node, family)})
        projections = [
            get_args(LoRAProjection) if node.get("projections") is None else node["projections"] for node in methods
        ]
        method["projections"] = sorted({name for names in projections for name in names})
    callbacks = [config["callbacks"] for config in configs]
    previews = [node["samples"] for node in callbacks if node.get("samples")]
    largest_callbacks = {
        "samples": max(previews, key=lambda samples: samples["sampling"]["batch_size"], default=None),
        "ema": next((node["ema"] for node in callbacks if node.get("ema")), None),
    }
    result = {**first, "method": method, "optimizer": optimizer, "callbacks": {**callbacks[0], **largest_callbacks}}
    for key in ("new_tokens", "tokens_lr"):
        if values := [config[key] for config in configs if config.get(key)]:
            result[key] = values[0]
    return result


def _targets(method: Mapping[str, Any], family: Family) -> Sequence[str]:
    """Targets of a LoRA's ``method`` node; all targets if the file ``method.weights`` sets its layers."""
    if method.get("targets"):
        targets: Sequence[str] = method["targets"]
        return targets
    layers_of_file = method.get("weights") and method.get("projections") is None
    return (*family.lora_targets, "text_encoder") if layers_of_file else family.default_targets


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """First key whose difference keeps two jobs from sharing a backbone; None if they can share."""
    settings, other_settings = _shared(one), _shared(other)
    return next((key for key in settings if settings[key] != other_settings.get(key)), None)


def alone(config: Mapping[str, Any]) -> str | None:
    """Reason why a job can share its backbone with no other job; None if it can."""
    method = resolve(str(config["method"]["_target_"]), "method", config.get("trust") or ())
    if getattr(method, "artifact_kind", None) not in ("lora", "embeddings"):
        return f"method: {method.__name__} trains the backbone or an additional network"
    if method not in (LoRA, TextualInversion):
        return f"method: {method.__name__} may train more than LoRA pairs or new tokens"
    if T5 in (config["method"].get("encoders") or ()):
        return "method.encoders: T5 cannot learn the words of several jobs at once"
    if config["backbone"].get("from_scratch"):
        return "backbone.from_scratch: the job's seed initializes the weights"
    if config["hardware"].get("offload"):
        return "hardware.offload: it would move weights that other jobs need"
    if config["trainer"].get("detect_anomaly"):
        return "trainer.detect_anomaly: a NaN in one job would end all jobs"
    if int(config["hardware"].get("num_nodes", 1)) > 1:
        return "hardware.num_nodes: a group of jobs runs on one machine; set hardware.num_nodes=1"
    return None


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that two jobs must have in common, by dotted key."""
    common = flat({key: value for key, value in config.items() if key not in _PER_RUN})
    for key in _COMMON:
        group, _, name = key.partition(".")
        common[key] = config[group].get(name)
    data = config["data"]
    common["data.class_prompt"] = _has_class(data)
    for name, source in (data.get("sources") or {}).items():
        common[f"data.sources.{name}"] = (_has_class({**data, **source}), source.get("resolution"))
    return common


def _has_class(data: Mapping[str, Any]) -> bool:
    """Whether the data has class images."""
    has_class = data.get("class_prompt") is not None or data.get("class_path") is not None
    return has_class and data.get("prior_weight", 1.0) > 0
