"""``sdtune plan``: what each method will cost, measured on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
from annotated_types import Ge, Gt, MinLen
from omegaconf import DictConfig, OmegaConf

from sdtune.backbone.meta import MetaPretrained
from sdtune.backbone.new_tokens import NewToken
from sdtune.backbone.single_file import shipped
from sdtune.config import hardware
from sdtune.config.build import build
from sdtune.config.compose import choices, composed_again
from sdtune.config.model import check_model
from sdtune.config.schema import check_value
from sdtune.config.settings import plain, read_settings
from sdtune.config.targets import resolve
from sdtune.data import ImageDataModule
from sdtune.errors import UserError
from sdtune.hardware.devices import accelerator
from sdtune.hardware.precision import precision
from sdtune.methods.base import Adapter
from sdtune.planning import tables
from sdtune.planning.request import PlanRequest, count
from sdtune.suggest import suggestion

_GROUPS = ("method", "backbone", "objective", "optimizer", "lr_schedule", "trainer", "hardware", "callbacks")
_DATA = ("batch_size", "resolution", "cache_latents", "cache_text", "class_prompt", "class_path", "prior_weight")

_WORD = NewToken("<new>", "a")
"""Stands for the words of a method that is nothing without one."""


@dataclass(frozen=True)
class CheckedPlan:
    """One method's checked config, and what was made of it."""

    config: dict[str, Any]
    source: MetaPretrained
    data: dict[str, Any]
    count: int
    side: int
    accumulation: int
    precision: str
    gpu: bool


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check everything, for each method that is asked for; the data is not read."""
    fits = config.fits
    check_value(fits, Annotated[float, Gt(0)] | None, "fits")
    several = config.methods is not None
    if several:
        jobs = {name: checked_plan(composed_again(config, "method", name)) for name in _methods(config)}
    else:
        jobs = {str(config.hydra.runtime.choices.method): checked_plan(config)}
    return lambda composed: execute(str(config.hydra.runtime.choices.backbone), jobs, several, fits)


def _methods(config: DictConfig) -> list[str]:
    known = choices(config, "method")
    if config.methods == "all":
        return known
    names = list(config.methods) if OmegaConf.is_list(config.methods) else [config.methods]
    check_value(names, Annotated[list[str], MinLen(1)], "methods")
    for name in names:
        if name not in known:
            raise UserError(f"{name}: there is no such method{suggestion(name, known)}", key="methods")
    return names


def checked_plan(config: DictConfig, shared: bool = False) -> CheckedPlan:
    """What a composed ``config`` asks for, checked; UserError for the first thing that is wrong.

    ``shared``: as it trains where it shares a backbone, by itself on one of the devices.
    """
    # The rest of the config is a training's own: images need not exist, and nothing is logged.
    own = OmegaConf.masked_copy(config, [*_GROUPS, "trust", "seed", "new_tokens", "tokens_lr", "default_lr"])
    configs = shipped(str(config.hydra.runtime.choices.backbone))
    if OmegaConf.is_missing(own.backbone, "path") and configs is not None:
        own.backbone.path = str(configs)
    container = plain(own)
    if shared:
        container["hardware"] = hardware.on_one(container["hardware"])
    hints = get_type_hints(ImageDataModule, include_extras=True)
    given = plain(OmegaConf.masked_copy(config.data, [key for key in _DATA if key in config.data]))
    data = {key: given.get(key, getattr(ImageDataModule, key)) for key in _DATA}
    for key, value in data.items():
        check_value(value, hints[key], f"data.{key}")
    check_model(container, read_settings(container).trust)
    accumulation = container["trainer"].get("accumulate_grad_batches", 1)
    check_value(accumulation, Annotated[int, Ge(1)], "trainer.accumulate_grad_batches")
    hardware.check_hardware(container["hardware"], here=False)
    kind = accelerator(str(container["hardware"].get("accelerator", "auto")))
    wanted = str(container["hardware"].get("precision", "auto"))
    if wanted == "auto" and kind in ("gpu", "cuda") and not torch.cuda.is_available():
        wanted = "bf16-mixed"  # of a GPU that is elsewhere; every one since 2020 has it
    source = MetaPretrained(**{k: v for k, v in container["backbone"].items() if not k.startswith("_")})
    side = data["resolution"] or source.facts.side
    if side % source.facts.factor:
        raise UserError(f"{side} is not a multiple of {source.facts.factor}, the VAE's factor", key="data.resolution")
    return CheckedPlan(
        config=container,
        source=source,
        data=data,
        count=hardware.micro_batch(container["hardware"], data["batch_size"], accumulation),
        side=side,
        accumulation=accumulation,
        precision=precision(wanted, kind),
        gpu=kind != "cpu",
    )


def execute(backbone: str, jobs: dict[str, CheckedPlan], table: bool, fits: float | None) -> None:
    """Measure and print."""
    first = next(iter(jobs.values()))
    devices = hardware.process_count(first.config["hardware"])
    found = {name: count(plan_request(job)) for name, job in jobs.items()}
    print(
        f"{', '.join(jobs)} on {backbone}: {first.side}x{first.side} pixels, batch {first.data['batch_size']},"
        f" {first.precision}, {devices} {'GPU' if first.gpu else 'CPU'}{'s' if devices > 1 else ''}\n"
    )
    if table:
        lines = tables.many(found, first.accumulation, devices, fits)
    else:
        lines = tables.one(next(iter(found.values())), first.accumulation, devices, fits)
    print("\n".join(lines))


def _class(config: dict[str, Any]) -> type[Adapter]:
    found: type[Adapter] = resolve(config["method"]["_target_"], "method", config["trust"])
    return found


def _pairs(job: CheckedPlan) -> bool:
    """Whether each sample is an image of the subject and one of its class."""
    named = job.data["class_prompt"] is not None or job.data["class_path"] is not None
    return job.data["prior_weight"] > 0 and (named or _class(job.config).uses_class_images)


def plan_request(job: CheckedPlan) -> PlanRequest:
    """What is to be counted of ``job``."""
    samples, pairs = job.config["callbacks"].get("samples"), _pairs(job)
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
    )


def _adapter(job: CheckedPlan) -> Adapter:
    """The method over the outlined backbone, not yet built."""
    top = read_settings(job.config)
    trust = top.trust
    optimizer = dict(job.config["optimizer"])
    if "fused" in optimizer:
        optimizer["fused"] = False  # there is no such kernel for the meta device; its state is the same
    adapter: Adapter = build(
        job.config["method"],
        trust,
        {
            "backbone": job.source,
            "objective": build(job.config["objective"], trust),
            "optimizer": build(optimizer, trust),
            "new_tokens": top.new_tokens or ((_WORD,) if _class(job.config).needs_tokens else ()),
            "tokens_lr": top.tokens_lr,
            "vae_tiling": job.config["hardware"].get("vae_tiling", False),
        },
    )
    return adapter
