"""The trainings that the check measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

SIDES = {"pocket": 64, "sd15": 512, "sdxl": 1024}
"""Pixels of the native resolutions."""

NEW_TOKEN = ('new_tokens=[{token: "<new>", init: cat}]', "data.templates=['<new> {}']")
CHECKPOINTING = "hardware.gradient_checkpointing=true"


def images_folder(work: Path, kind: str) -> Path:
    """Folder of the images in the native resolution of ``kind``, as :func:`experiments.benchmark.commands.images`."""
    return work / f"images-{kind}"


@dataclass(frozen=True)
class Configuration:
    """A training at the native resolution of its backbone.

    Args:
        kind: ``sd15`` or ``sdxl``.
        batch: samples per step, in one micro-batch; pairs for DreamBooth.
        more: further overrides.
        prior: whether the images serve as class images too.
        instead: configuration that is measured if this one does not fit on the GPU; None: there is none.
    """

    name: str
    kind: str
    method: str
    batch: int = 1
    more: tuple[str, ...] = ()
    prior: bool = False
    instead: Configuration | None = None

    def settings(self, work: Path) -> list[str]:
        """Overrides of ``sdtune train`` and ``sdtune plan`` with the files below ``work``."""
        data = images_folder(work, self.kind)
        prior = ["data.class_prompt=a photo of a dog", f"data.class_path={data / 'bare'}"] if self.prior else []
        return [
            f"method={self.method}",
            f"backbone={self.kind}",
            f"backbone.path={work / self.kind}",
            "data=folder",
            f"data.path={data / 'captioned'}",
            f"data.batch_size={self.batch}",
            f"data.resolution={SIDES[self.kind]}",
            "hardware=gpu",
            "lr_schedule.warmup_steps=0",
            "callbacks.samples=null",
            "evaluation=none",
            *prior,
            *self.more,
        ]


_QUANTIZED = Configuration(
    "SDXL LoRA, int8, checkpointing", "sdxl", "lora", more=("backbone.quantize=int8", CHECKPOINTING)
)

SPEED = (
    Configuration("SD 1.5 LoRA", "sd15", "lora"),
    Configuration("SD 1.5 LoRA, batch 4", "sd15", "lora", 4),
    Configuration("SD 1.5 LoRA, batch 16", "sd15", "lora", 16),
    Configuration("SD 1.5 Textual Inversion", "sd15", "textual_inversion", more=NEW_TOKEN),
    Configuration("SD 1.5 full", "sd15", "full"),
    Configuration("SD 1.5 full, batch 4", "sd15", "full", 4),
    Configuration("SD 1.5 DreamBooth", "sd15", "dreambooth", prior=True),
    Configuration("SD 1.5 ControlNet", "sd15", "controlnet", more=("data/control=canny",)),
    Configuration("SDXL LoRA", "sdxl", "lora"),
    Configuration("SDXL LoRA, checkpointing", "sdxl", "lora", more=(CHECKPOINTING,)),
    Configuration("SDXL LoRA, batch 4, checkpointing", "sdxl", "lora", 4, (CHECKPOINTING,)),
    Configuration("SDXL full, checkpointing", "sdxl", "full", more=(CHECKPOINTING,), instead=_QUANTIZED),
)
"""The twelve configurations whose step is measured."""

WAITS = (
    *("SD 1.5 LoRA", "SD 1.5 Textual Inversion", "SD 1.5 full", "SD 1.5 DreamBooth", "SD 1.5 ControlNet"),
    "SDXL LoRA, checkpointing",
)
"""Names of the configurations whose waits are rows of their own: each method, and SDXL."""


@dataclass(frozen=True)
class Card:
    """A complete run on ``gib`` GiB: the arguments of a recipe, its caches, previews, steps and evaluation."""

    gib: int
    run: str
    kind: str
    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.gib} GiB: {self.run}"

    def arguments(self, work: Path) -> list[str]:
        """Overrides of ``sdtune train`` and ``sdtune plan`` with the files below ``work``."""
        return [
            *self.settings,
            f"backbone.path={work / self.kind}",
            f"backbone.clip={work / 'clip'}",
            f"data.path={images_folder(work, self.kind) / 'captioned'}",
            "trainer.max_steps=3",
            "evaluation=clip",
            "evaluation.images=4",
            *("evaluation.sampling.steps=4", "evaluation.sampling.sampler=ddim"),
            "callbacks.samples.every_steps=null",
            *("callbacks.samples.sampling.steps=4", "callbacks.samples.sampling.sampler=ddim"),
        ]


CARDS = (
    Card(12, "SDXL LoRA, hardware=gpu_12gb", "sdxl", ("experiment=sdxl_lora", "hardware=gpu_12gb")),
    Card(
        16,
        "SD 1.5 DreamBooth",
        "sd15",
        (
            *("experiment=sd15_dreambooth", "hardware=gpu", "optimizer=adamw"),
            *("data.class_prompt=a photo of a dog", "data.class_images=4"),
        ),
    ),
    Card(
        24,
        "SDXL LoRA without checkpointing",
        "sdxl",
        (
            *("experiment=sdxl_lora", "hardware=gpu", "hardware.gradient_checkpointing=false"),
            "hardware.vae_tiling=true",
        ),
    ),
)


class Plan(TypedDict):
    """What ``sdtune plan`` counts, in GiB: peak of a step, peak of the run, and memory of the smallest GPU."""

    step: float
    peak: float
    fits: float


def planned_settings(work: Path) -> dict[str, list[str]]:
    """Settings of everything that is planned, by name: the configurations, those instead of them, and the cards."""
    configurations = [*SPEED, *(c.instead for c in SPEED if c.instead is not None)]
    return {c.name: c.settings(work) for c in configurations} | {card.name: card.arguments(work) for card in CARDS}


def that_fits(configuration: Configuration, plans: Mapping[str, Plan], gib: float) -> Configuration | None:
    """``configuration`` if its planned memory fits on a GPU of ``gib`` GiB, else the one instead of it, else None."""
    candidates = (configuration, configuration.instead)
    return next((c for c in candidates if c is not None and plans[c.name]["fits"] <= gib), None)
