"""Memory by phase and waits of the CUDA path, compared with ``sdtune plan``; make gpu-stub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu_stub.conftest import Run
from gpu_stub.run import GIB, Measured
from sdtune.commands.plan import checked_plan, configured_switches, plan_request
from sdtune.config.compose import compose, search_path
from sdtune.planning.memory import Memory, memory
from sdtune.planning.request import count

pytestmark = [pytest.mark.gpu_stub, pytest.mark.timeout(900)]

WORD = ('new_tokens=[{token: "<new>", init: cat}]', "data.templates=['<new> {}']")
CLASS = ("data.class_prompt=a photo of a dog", "data.class_images=4")

NO_CHECKPOINTING = ("hardware=gpu", "hardware.gradient_checkpointing=false")

SD15 = {
    "lora": ("sd15_lora", "sd15", ()),
    "word": ("sd15_textual_inversion", "sd15", WORD),
    "dreambooth": ("sd15_dreambooth", "sd15", CLASS),
    "full": ("sd15_full", "sd15", ("callbacks.ema=null",)),
    "controlnet": ("sd15_controlnet", "sd15", ()),
}

RECIPES = {**SD15, "lora of SDXL": ("sdxl_lora", "sdxl", ("data.resolution=512",))}


@pytest.mark.parametrize("name", RECIPES)
def test_memory_of_each_phase_is_within_six_percent_of_the_plan(name: str, training: Run) -> None:
    recipe, kind, more = RECIPES[name]
    # A micro-batch would contain the previews that follow it.
    measured = training(recipe, kind, *more, "hardware=gpu", "callbacks.samples.every_steps=null")
    assert measured.code == 0, measured.output
    plan = planned_memory(f"experiment={recipe}", f"backbone={kind}", *more, "data.resolution=512", "hardware=gpu")
    phases = {
        "micro-batch": plan.step,
        "caches": plan.encoding,
        "previews": plan.previews,
        "class images": plan.class_images,
        "evaluation": plan.evaluation,
    }
    ratios = {phase: measured.peak(phase) * GIB / planned for phase, planned in phases.items() if planned}
    assert all(0.94 <= ratio <= 1.06 for ratio in ratios.values()), ratios


CARDS = {
    **{
        f"{name} on 12": (12, recipe, kind, (*more, "hardware=gpu_12gb")) for name, (recipe, kind, more) in SD15.items()
    },
    "lora of SDXL on 12": (12, "sdxl_lora", "sdxl", ("hardware=gpu_12gb",)),
    "word of SDXL on 12": (12, "sd15_textual_inversion", "sdxl", ("backbone=sdxl", *WORD, "hardware=gpu_12gb")),
    "dreambooth with AdamW on 16": (16, "sd15_dreambooth", "sd15", (*CLASS, "hardware=gpu", "optimizer=adamw")),
    "lora of SDXL without checkpointing on 24": (24, "sdxl_lora", "sdxl", NO_CHECKPOINTING),
}
"""Memory of the card in GiB, recipe, backbone, overrides; SDXL at its own resolution of 1024 pixels."""


@pytest.mark.parametrize("name", CARDS)
def test_run_completes_on_the_card(name: str, training: Run, tmp_path: Path) -> None:
    gib, recipe, kind, more = CARDS[name]
    measured = training(recipe, kind, *more, gib=gib, steps=3)
    assert measured.code == 0, measured.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert "out of memory" not in json.dumps(metrics)
    assert metrics["clip_image"] is not None
    assert max(measured.device_peaks) < gib * GIB


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "prodigy", "adafactor"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("cached", ["true", "false"])
def test_no_line_waits_between_two_flushes(optimizer: str, precision: str, cached: str, training: Run) -> None:
    caches = [f"data.cache_latents={cached}", f"data.cache_text={cached}"]
    settings = ["hardware=gpu", f"hardware.precision={precision}", f"optimizer={optimizer}"]
    settings += ["optimizer.lr=1.0" if optimizer == "prodigy" else "optimizer.lr=1e-4"]
    without = ["evaluation=none", "callbacks.samples=null", "trainer.log_every_n_steps=100"]
    measured = training("sd15_lora", "sd15", *caches, *settings, *without)
    assert measured.code == 0, measured.output
    assert waits(measured) == {"stream_waits": 0, "device_waits": 0, "event_waits": 0}, measured.waiting_lines


def test_run_uses_only_the_configured_device_of_two(training: Run) -> None:
    measured = training("sd15_lora", "sd15", "hardware=gpu", "hardware.devices=[1]", steps=3, devices=2)
    assert measured.code == 0, measured.output
    first, second = measured.device_peaks
    assert first == 0 < second


def test_sweep_divides_its_jobs_among_two_devices(training: Run, tmp_path: Path) -> None:
    sweep = ["hardware=gpu", "hardware.devices=2", "hydra/launcher=shared_backbone", "method.rank=4,8"]
    measured = training("sd15_lora", "sd15", *sweep, "evaluation=none", steps=3, devices=2, sweep=True)
    assert measured.code == 0, measured.output
    assert len(list((tmp_path / "run").glob("*/metrics.json"))) == 2
    assert measured.device_peaks == (0, 0)
    assert [[peak > 0 for peak in peaks] for peaks in measured.child_peaks] == [[True, False], [False, True]]


def planned_memory(*settings: str) -> Memory:
    """Memory that ``sdtune plan`` counts for the settings of a training."""
    job = checked_plan(compose("plan", search_path(None), list(settings)))
    return memory(count(plan_request(job)), configured_switches(job), job.accumulation, 1)


def waits(measured: Measured) -> dict[str, float]:
    return {name: measured.steady(name) for name in ("stream_waits", "device_waits", "event_waits")}
