"""Recipes for Stable Diffusion: two training steps on a tiny backbone and at true shapes, and a plan."""

from __future__ import annotations

import json
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from families import build_sd3
from image_data import noise
from running import plan, rows, train
from sdtune.commands.plan import checked_plan, plan_request
from sdtune.config.compose import compose, search_path
from sdtune.hardware.precision import autocast
from sdtune.paths import config_folder
from sdtune.planning.kernels import Kernels
from sdtune.planning.measure import MetaItems, meta_batch
from sdtune.planning.request import meta_adapter
from sdtune.training.gradient_checkpointing import checkpoint_activations

RECIPES = sorted((config_folder() / "experiment").glob("sd*.yaml"))

SMALL = (
    "data.resolution=32",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "callbacks.samples.sampling.steps=2",
    "evaluation.images=2",
    "evaluation.sampling.steps=2",
    "hardware=cpu",
    "hardware.precision=32-true",
)


def recipe_arguments(recipe: Path, tiny: Path, images: Path) -> list[str]:
    """Arguments of ``sdtune train`` in the recipe's command, with existing folders."""
    arguments = shlex.split(recipe.read_text(encoding="utf-8").splitlines()[1])[3:]
    assert arguments[0] == f"experiment={recipe.stem}"
    paths = {"backbone.path=FOLDER": f"backbone.path={tiny}", "data.path=DIR": f"data.path={images}"}
    return [paths.get(argument, argument) for argument in arguments]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem.startswith("sd15")], ids=lambda path: path.stem)
def test_sd15_recipe_trains_two_steps_on_a_tiny_backbone(
    recipe: Path, tiny: Path, images: Path, tmp_path: Path
) -> None:
    arguments = recipe_arguments(recipe, tiny, images)
    for caption in images.glob("*.txt") if "textual_inversion" in recipe.stem else ():
        caption.unlink()  # data.prompt has the new token and is used only for images without a caption
    overrides = [*SMALL, *(["data.class_images=2"] if "class_prompt" in " ".join(arguments) else [])]
    run = tmp_path / "run"
    assert train(*arguments, *overrides, f"hydra.run.dir={run}") == 0
    assert len(rows(run)) == 2
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["steps"] == 2
    assert [path for path in (run / "artifact").rglob("*") if path.is_file()]
    assert (run / "samples" / "before_after.png").is_file()


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(r, marks=[] if r.stem == "sd35_lora" else [pytest.mark.slow], id=r.stem)
        for r in RECIPES
        if r.stem.startswith("sd35")
    ],
)
def test_sd35_recipe_trains_two_steps_on_a_tiny_transformer(recipe: Path, tmp_path: Path) -> None:
    folder = build_sd3(tmp_path / "model", "sd35_medium")
    for number in range(2):
        noise(tmp_path / "images" / f"{number}.png", 96, 80, number)
    arguments = recipe_arguments(recipe, folder, tmp_path / "images")
    small = [word for word in SMALL if not word.startswith("data.resolution")]
    overrides = [*small, "data.resolution=64", "backbone.t5_tokens=12", "optimizer=adamw"]
    overrides += ["data.class_images=2"] if "class_prompt" in " ".join(arguments) else []
    overrides += ["data.prompt=a fox"] if "data.prompt" not in " ".join(arguments) else []
    run = tmp_path / "run"
    assert train(*arguments, *overrides, f"hydra.run.dir={run}") == 0
    assert len(rows(run)) == 2
    assert [path for path in (run / "artifact").rglob("*.safetensors") if path.is_file()]
    card = (run / "artifact" / "README.md").read_text(encoding="utf-8")
    assert ("`SD3ControlNetModel.from_pretrained" in card) == (recipe.stem == "sd35_controlnet")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_two_steps_at_true_shapes_on_the_meta_device(recipe: Path) -> None:
    """Forward, backward and optimizer step, with the micro-batches and the batch size of the recipe."""
    overrides = [
        word
        for word in shlex.split(recipe.read_text(encoding="utf-8").splitlines()[1])[3:]
        if word.startswith("experiment=")
    ]
    job = checked_plan(compose("plan", search_path(None), [*overrides, "hardware=gpu"]))
    request = plan_request(job)
    adapter = meta_adapter(request)
    adapter.on_fit_start()
    adapter.prepare_for_device(torch.device("meta"))
    if job.config["hardware"].get("gradient_checkpointing"):
        checkpoint_activations(adapter, context_fn=lambda: (nullcontext(), Kernels(True)))
    optimizer = adapter.make_optimizer(adapter.optimizer_groups())
    caches = not adapter.trains("vae"), not adapter.trains("text_encoder")
    frozen = [parameter for parameter in adapter.parameters() if not parameter.requires_grad]
    for _ in range(2):
        for _ in range(job.accumulation):
            batch = meta_batch(adapter, 2 * job.count if request.pairs else job.count, job.side, *caches)
            if request.pairs:
                batch |= {"subject_count": job.count, "prior_weight": 1.0}
            with Kernels(True), autocast(torch.device("meta"), job.precision):
                loss = adapter.training_step(batch, 0)
            loss.backward()
        gradients = {name: parameter.grad for name, parameter in adapter.trainable()}
        assert gradients
        assert not [name for name, gradient in gradients.items() if gradient is None]
        with MetaItems():
            optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.state) == len(gradients)
    assert not [parameter for parameter in frozen if parameter.grad is not None]


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=[] if r.stem == "sd15_lora" else [pytest.mark.slow], id=r.stem) for r in RECIPES],
)
def test_recipe_can_be_planned(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        word
        for word in shlex.split(recipe.read_text(encoding="utf-8").splitlines()[1])[3:]
        if word != "backbone.path=FOLDER"
    ]
    assert plan(*arguments) == 0
    side = 512 if recipe.stem.startswith("sd15") else 1024
    assert f": {side}x{side} pixels, batch " in capsys.readouterr().out.splitlines()[0]
