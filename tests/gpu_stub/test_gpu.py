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

RECIPES = {
    "lora": ("sd15_lora", "sd15", ()),
    "word": ("sd15_textual_inversion", "sd15", WORD),
    "dreambooth": ("sd15_dreambooth", "sd15", CLASS),
    "full": ("sd15_full", "sd15", ("callbacks.ema=null",)),
    "controlnet": ("sd15_controlnet", "sd15", ()),
    "lora of SDXL": ("sdxl_lora", "sdxl", ("data.resolution=512",)),
}


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


@pytest.mark.parametrize("name", RECIPES)
def test_run_completes_on_12_gib(name: str, training: Run, tmp_path: Path) -> None:
    recipe, kind, more = RECIPES[name]
    measured = training(recipe, kind, *more, "hardware=gpu_12gb", gib=12, steps=3)
    assert measured.code == 0, measured.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert "out of memory" not in json.dumps(metrics)
    assert max(measured.device_peaks) < 12 * GIB


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


def planned_memory(*settings: str) -> Memory:
    """Memory that ``sdtune plan`` counts for the settings of a training."""
    job = checked_plan(compose("plan", search_path(None), list(settings)))
    return memory(count(plan_request(job)), configured_switches(job), job.accumulation, 1)


def waits(measured: Measured) -> dict[str, float]:
    return {name: measured.steady(name) for name in ("stream_waits", "device_waits", "event_waits")}
