"""``sdtune plan``: memory and compute of each method, measured on the meta device without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import torch
from annotated_types import Ge, Gt, MinLen
from omegaconf import DictConfig, OmegaConf

from sdtune.backbone.meta import MetaPretrained
from sdtune.backbone.new_tokens import NewToken
from sdtune.backbone.single_file import included_configs
from sdtune.config import hardware
from sdtune.config.build import build
from sdtune.config.compose import choices, recompose
from sdtune.config.model import CALLBACK_ARGUMENTS, check_model
from sdtune.config.schema import check_node, check_value
from sdtune.config.settings import plain, read_settings
from sdtune.config.targets import resolve
from sdtune.data import ImageDataModule
from sdtune.errors import UserError
from sdtune.hardware.devices import accelerator
from sdtune.hardware.precision import precision
from sdtune.methods.base import Adapter
from sdtune.planning import tables
from sdtune.planning.measure import TrainingCosts
from sdtune.planning.memory import GIB, Memory, Switches, memory
from sdtune.planning.request import PlanRequest, count
from sdtune.progress import phase, track
from sdtune.suggest import suggestion

if TYPE_CHECKING:
    import plotly.graph_objects as go

_GROUPS = (
    "method",
    "backbone",
    "objective",
    "optimizer",
    "lr_schedule",
    "trainer",
    "hardware",
    "callbacks",
    "evaluation",
)
_DATA_KEYS = ("batch_size", "resolution", "cache_latents", "cache_text", "class_prompt", "class_path", "prior_weight")

_MORE_KEYS = ("sources", "captions")

_PLACEHOLDER_TOKEN = NewToken("<new>", "a")
"""Used for a method that requires new tokens when the config has none."""


_LOWER_RESOLUTIONS = (768, 512, 384, 256)
"""Pixels, in the order in which they are tried."""


@dataclass(frozen=True)
class CheckedPlan:
    """The checked config of one method, with the values derived from it.

    Args:
        config: the parts of the config that determine the cost.
        source: the backbone on the meta device.
        data: settings of the data module.
        count: samples per micro-batch and process.
        side: image side in pixels.
        accumulation: micro-batches per step.
        precision: Lightning's name of the precision.
        gpu: whether the training runs on a GPU.
    """

    config: dict[str, Any]
    source: MetaPretrained
    data: dict[str, Any]
    count: int
    side: int
    accumulation: int
    precision: str
    gpu: bool


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check the config of each requested method, and return the function that measures; reads no data."""
    measure = planned(config)
    return lambda composed: print(measure())


def planned(config: DictConfig) -> Callable[[], Plan]:
    """Check the config of each requested method, and return the function that measures these methods."""
    fits = config.fits
    check_value(fits, Annotated[float, Gt(0)] | None, "fits")
    is_table = config.methods is not None
    if is_table:
        jobs = {name: checked_plan(recompose(config, "method", name)) for name in _methods(config)}
    else:
        jobs = {str(config.hydra.runtime.choices.method): checked_plan(config)}
    return lambda: measured(str(config.hydra.runtime.choices.backbone), jobs, is_table, fits)


def _methods(config: DictConfig) -> list[str]:
    known = choices(config, "method")
    if config.methods == "all":
        return known
    names = list(config.methods) if OmegaConf.is_list(config.methods) else [config.methods]
    check_value(names, Annotated[list[str], MinLen(1)], "methods")
    for name in names:
        if name not in known:
            raise UserError(f"unknown method {name}{suggestion(name, known)}", key="methods")
    return names


def checked_plan(config: DictConfig, shared: bool = False) -> CheckedPlan:
    """Check the parts of a composed ``config`` that determine the cost of the training.

    Args:
        shared: whether the run shares its backbone with others, and therefore trains on one device.

    Raises:
        UserError: for the first setting that is wrong.
    """
    # Images need not exist and nothing is logged, so the other parts of the config are not checked.
    training_config = OmegaConf.masked_copy(
        config, [*_GROUPS, "trust", "seed", "new_tokens", "tokens_lr", "default_lr"]
    )
    configs = included_configs(str(config.hydra.runtime.choices.backbone))
    if OmegaConf.is_missing(training_config.backbone, "path") and configs is not None:
        training_config.backbone.path = str(configs)
    container = plain(training_config, _GROUPS)
    if shared:
        container["hardware"] = hardware.single_device(container["hardware"])
    hints = get_type_hints(ImageDataModule, include_extras=True)
    data_config = plain(OmegaConf.masked_copy(config.data, [key for key in _DATA_KEYS if key in config.data]))
    data = {key: data_config.get(key, getattr(ImageDataModule, key)) for key in _DATA_KEYS}
    for key, value in data.items():
        check_value(value, hints[key], f"data.{key}")
    trust = read_settings(container).trust
    check_model(container, trust)
    for key, node in container["callbacks"].items():
        check_node(node, f"callbacks.{key}", trust, CALLBACK_ARGUMENTS)
    accumulation = container["trainer"].get("accumulate_grad_batches", 1)
    check_value(accumulation, Annotated[int, Ge(1)], "trainer.accumulate_grad_batches")
    hardware.check_hardware(container["hardware"], here=False)
    accelerator_name = accelerator(str(container["hardware"].get("accelerator", "auto")))
    precision_name = str(container["hardware"].get("precision", "auto"))
    if precision_name == "auto" and accelerator_name in ("gpu", "cuda") and not torch.cuda.is_available():
        precision_name = "bf16-mixed"  # for a GPU of another machine: NVIDIA GPUs since 2020 support it
    source = MetaPretrained(**{k: v for k, v in container["backbone"].items() if not k.startswith("_")})
    data = most_expensive(data, plain(OmegaConf.masked_copy(config.data, [k for k in _MORE_KEYS if k in config.data])))
    resolution = data["resolution"] or source.facts.side
    side = resolution if isinstance(resolution, int) else max(resolution)  # the largest costs most
    source.facts.check_side(side, "data.resolution")
    return CheckedPlan(
        config=container,
        source=source,
        data=data,
        count=hardware.micro_batch(container["hardware"], data["batch_size"], accumulation),
        side=side,
        accumulation=accumulation,
        precision=precision(precision_name, accelerator_name),
        gpu=accelerator_name != "cpu",
    )


def most_expensive(data: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with what costs most in the sources of a mix, and without a text cache if captions are drawn anew.

    Args:
        more: the nodes ``sources`` and ``captions`` of the data.
    """
    sources = [source for source in (more.get("sources") or {}).values() if isinstance(source, Mapping)]
    nodes = [{**data, **source} for source in sources] or [data]
    captions = [{**(more.get("captions") or {}), **(source.get("captions") or {})} for source in sources or [{}]]
    sides = [side for node in nodes for side in _as_list(node["resolution"])]
    with_class = [n for n in nodes if n["prior_weight"] > 0 and (n["class_prompt"] or n["class_path"])]
    # Generated class images cost more than those of a folder.
    class_node = min(with_class, key=lambda node: node["class_path"] is not None, default=data)
    draws = any(c.get("kind") == "tags" and (c.get("shuffle") or c.get("caption_tag_dropout_rate")) for c in captions)
    return {
        **data,
        **{key: class_node[key] for key in ("class_prompt", "class_path", "prior_weight")},
        "resolution": max(sides) if sides else None,
        "cache_text": data["cache_text"] and not draws,
    }


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


@dataclass(frozen=True)
class Plan:
    """What trainings will cost; ``print`` shows the text of ``sdtune plan``.

    Attributes:
        text: tables of parameters, computation and memory.
        peaks: method -> phase, such as ``a training step`` -> memory in bytes on each device, with the configured
            memory settings.
    """

    text: str
    peaks: Mapping[str, Mapping[str, int]]

    def __str__(self) -> str:
        return self.text

    def figure(self) -> go.Figure:
        """Bar chart of the memory in GiB that each phase of each method needs."""
        import plotly.graph_objects as go

        bars = [
            go.Bar(name=method, x=list(peaks), y=[count / GIB for count in peaks.values()])
            for method, peaks in self.peaks.items()
        ]
        return go.Figure(bars, {"yaxis": {"title": {"text": "GiB for each device"}}, "template": "plotly_white"})


def measured(backbone: str, jobs: dict[str, CheckedPlan], table: bool, fits: float | None) -> Plan:
    """Measure each method; the text has a row for each method if ``table``."""
    first = next(iter(jobs.values()))
    devices = hardware.process_count(first.config["hardware"])
    costs = {name: count(plan_request(job)) for name, job in track("Measuring", jobs.items(), len(jobs))}
    parts = first.accumulation * devices
    split = f" ({parts} micro-batches of {first.count})" if parts > 1 else ""
    head = (
        f"{', '.join(jobs)} on {backbone}: {first.side}x{first.side} pixels, batch {first.data['batch_size']}{split},"
        f" {first.precision}, {devices} {'GPU' if first.gpu else 'CPU'}{'s' if devices > 1 else ''}\n"
    )
    if table:
        lines = tables.many(costs, first.accumulation, devices, fits)
    else:
        [cost] = costs.values()
        smaller = partial(_smaller, first, cost, devices)
        names = _memory_settings(first, cost)
        with phase("Trying settings"):
            lines = tables.one(cost, first.accumulation, devices, fits, configured_switches(first), names, smaller)
    peaks = {
        name: _peaks(memory(cost, configured_switches(jobs[name]), first.accumulation, devices))
        for name, cost in costs.items()
    }
    return Plan("\n".join([head, *lines]), peaks)


def _peaks(costs: Memory) -> dict[str, int]:
    """Memory in bytes of each phase that the run has."""
    return {name: count for attribute, name in tables.PEAKS.items() if (count := int(getattr(costs, attribute)))}


def _smaller(job: CheckedPlan, costs: TrainingCosts, devices: int, fits: float) -> str | None:
    """Settings that fit ``fits`` GiB; None if none do.

    Tried in this order: a smaller micro-batch, no EMA or no evaluation, a lower resolution.

    Args:
        costs: the costs of ``job`` as it is.
    """
    configured = configured_switches(job)

    def proposal(settings: str, accumulation: int, costs: TrainingCosts) -> str | None:
        added = tables.added(costs, accumulation, devices, fits, configured)
        return None if added is None else f"{settings} {added}".strip()

    candidates, request = [("", job.accumulation, costs)], plan_request(job)
    while request.micro_batch % 2 == 0:
        accumulation = 2 * request.accumulation
        request = replace(request, micro_batch=request.micro_batch // 2, accumulation=accumulation)
        candidates.append((f"trainer.accumulate_grad_batches={accumulation}", accumulation, count(request)))
        if (found := proposal(*candidates[-1])) is not None:
            return found
    for settings, accumulation, measured in candidates:
        for omitted, less in _without_extras(measured):
            if (found := proposal(f"{settings} {omitted}", accumulation, less)) is not None:
                return found
    settings, accumulation, _ = candidates[-1]
    for side in _LOWER_RESOLUTIONS:
        if side < request.side and side % job.source.facts.factor == 0:
            measured = count(replace(request, side=side))
            for omitted, less in (("", measured), *_without_extras(measured)):
                lower = f"{settings} data.resolution={side} {omitted}"
                if (found := proposal(lower, accumulation, less)) is not None:
                    return found
    return None


def _without_extras(costs: TrainingCosts) -> list[tuple[str, TrainingCosts]]:
    """Overrides that omit the EMA, the evaluation, or both, and the costs without them; only those that are enabled."""
    ema = ("callbacks.ema=null", {"average": 0}) if costs.average else None
    evaluation = ("evaluation=none", {"evaluation": None}) if costs.evaluation is not None else None
    single = [extra for extra in (ema, evaluation) if extra is not None]
    both = [(f"{single[0][0]} {single[1][0]}", single[0][1] | single[1][1])] if len(single) == 2 else []
    return [(text, replace(costs, **changes)) for text, changes in (*single, *both)]


def configured_switches(job: CheckedPlan) -> Switches:
    """The memory-saving options that the config has."""
    settings = job.config["hardware"]
    return Switches(
        checkpointing=bool(settings.get("gradient_checkpointing")),
        # adamw_by_size: the state is measured as configured
        eight_bit="8bit" in str(job.config["optimizer"].get("_target_")),
        offload=bool(settings.get("offload")),
    )


def _memory_settings(job: CheckedPlan, costs: TrainingCosts) -> str:
    """Names of the memory-saving options of ``job``."""
    configured = configured_switches(job)
    by_size = "by_size" in str(job.config["optimizer"].get("_target_"))
    names = {
        "gradient checkpointing": configured.checkpointing,
        "8-bit AdamW": configured.eight_bit or (by_size and costs.state < costs.gradients),
        "offloading": configured.offload,
        "VAE tiling": bool(job.config["hardware"].get("vae_tiling")),
        f"weights in {job.config['backbone'].get('quantize')}": job.config["backbone"].get("quantize") is not None,
    }
    return ", ".join(name for name, is_on in names.items() if is_on) or "plain"


def _method_class(config: dict[str, Any]) -> type[Adapter]:
    method: type[Adapter] = resolve(config["method"]["_target_"], "method", config["trust"])
    return method


def _has_prior_pairs(job: CheckedPlan) -> bool:
    """Whether each sample is a pair of a subject image and a class image (prior preservation)."""
    has_class_data = job.data["class_prompt"] is not None or job.data["class_path"] is not None
    return job.data["prior_weight"] > 0 and (has_class_data or _method_class(job.config).uses_class_images)


def plan_request(job: CheckedPlan) -> PlanRequest:
    """The request by which :mod:`sdtune.planning` measures ``job``."""
    samples, pairs = job.config["callbacks"].get("samples"), _has_prior_pairs(job)
    return PlanRequest(
        make_adapter=lambda: _adapter(job),
        micro_batch=job.count,
        pairs=pairs,
        side=job.side,
        accumulation=job.accumulation,
        precision=job.precision,
        gpu=job.gpu,
        gradient_checkpointing=bool(job.config["hardware"].get("gradient_checkpointing")),
        cache_latents=job.data["cache_latents"],
        cache_text=job.data["cache_text"],
        average=job.config["callbacks"].get("ema") is not None,
        previews=samples["sampling"]["batch_size"] if samples else 0,
        draws_class=pairs and job.data["class_path"] is None,
        evaluation=(job.config.get("evaluation") or {}).get("sampling", {}).get("batch_size", 0),
    )


def _adapter(job: CheckedPlan) -> Adapter:
    """The method over the backbone on the meta device, not yet configured."""
    settings = read_settings(job.config)
    trust = settings.trust
    optimizer = dict(job.config["optimizer"])
    if "fused" in optimizer:
        optimizer["fused"] = False  # the meta device has no fused kernels; the optimizer state is the same
    adapter: Adapter = build(
        job.config["method"],
        trust,
        {
            "backbone": job.source,
            "objective": build(job.config["objective"], trust),
            "optimizer": build(optimizer, trust),
            "new_tokens": settings.new_tokens
            or ((_PLACEHOLDER_TOKEN,) if _method_class(job.config).trains_only_new_tokens else ()),
            "tokens_lr": settings.tokens_lr,
            "vae_tiling": job.config["hardware"].get("vae_tiling", False),
        },
    )
    return adapter
