"""What a training will cost: counted on the meta device, and held against what is known and what is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from running import fit, folder_data, plan, train
from sdtune.backbone import Pretrained, cpu_convolution
from sdtune.backbone.meta import MetaPretrained
from sdtune.backbone.single_file import shipped
from sdtune.commands import plan as plan_command
from sdtune.config.compose import compose, search_path
from sdtune.methods import Full, LoRA
from sdtune.paths import config_folder
from sdtune.planning.kernels import Kernels
from sdtune.planning.measure import TrainingCosts
from sdtune.planning.memory import SWITCHES, memory
from sdtune.planning.meter import Meter
from sdtune.planning.request import count as count_costs

METHODS = sorted(path.stem for path in (config_folder() / "method").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))
GIB = 1024**3


def figures(*overrides: str) -> TrainingCosts:
    config = compose("plan", search_path(None), list(overrides))
    return count_costs(plan_command.plan_request(plan_command.checked_plan(config)))


def parts(found: TrainingCosts) -> dict[str, int]:
    """Component -> parameters, trained or not."""
    return {part.name: part.frozen + part.trained for part in found.components}


@pytest.fixture(scope="module")
def full() -> TrainingCosts:
    """SD 1.5, all of the UNet, one sample."""
    return figures("backbone=sd15", "method=full", "data.batch_size=1", "callbacks.samples=null")


# --- what is known of the models


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("sd15", {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}),
        ("sd21", {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}),
        ("sdxl", {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
    ],
)
def test_the_shipped_configs_are_the_models(kind: str, wanted: dict[str, int]) -> None:
    backbone = MetaPretrained(str(shipped(kind))).load()
    for name, count in wanted.items():
        parameters = list(getattr(backbone, name).parameters())
        assert sum(p.numel() for p in parameters) == count
        assert {p.device.type for p in parameters} == {"meta"}
    assert backbone.facts.side == {"sd15": 512, "sd21": 768, "sdxl": 1024}[kind]
    assert backbone.prediction_type == ("v_prediction" if kind == "sd21" else "epsilon")


def test_a_pass_through_sd15s_unet_has_401_6_gmac(full: TrainingCosts) -> None:
    assert full.plain.forward / 2 == pytest.approx(401.6e9, rel=1e-3)
    # Backward has twice the products of forward; attention's has two and a half times, for its scores come again.
    assert 3 <= full.plain.flop / full.plain.forward < 3.2


def test_full_fine_tuning_is_counted_to_the_byte(full: TrainingCosts) -> None:
    assert parts(full) == {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}
    assert (full.total.trained, full.total.frozen) == (859_520_964, 123_060_480 + 83_653_863)
    assert full.gradients == 4 * 859_520_964
    assert 8 * 859_520_964 <= full.state < 8.001 * 859_520_964
    assert full.artifact == 4 * (859_520_964 + 123_060_480 + 83_653_863)
    assert full.total.bytes == 4 * 859_520_964 + 2 * 123_060_480 + 4 * 83_653_863
    assert full.idle == 2 * 123_060_480 + 4 * 83_653_863


def test_a_rank_of_lora_has_199_296_parameters() -> None:
    adapter = LoRA(rank=1, backbone=MetaPretrained(str(shipped("sd15"))))
    with torch.device("meta"):
        adapter.configure_model()
    assert sum(p.numel() for _, p in adapter.trainable()) == 199_296
    assert {p.device.type for p in adapter.parameters()} == {"meta"}


# --- what is measured


@pytest.mark.parametrize("method", [LoRA, Full])
def test_on_pocket_the_figures_are_those_of_the_loaded_model(method: type[LoRA] | type[Full]) -> None:
    found = figures(f"method={method.__name__.lower()}")
    loaded = method(backbone=Pretrained())
    loaded.configure_model()
    wanted = {name: sum(p.numel() for p in part.parameters()) for name, part in loaded.backbone.named_children()}
    assert parts(found) == wanted
    assert found.total.trained == sum(p.numel() for _, p in loaded.trainable())


def real_step(model: LoRA | Full, side: int) -> Meter:
    """A step on the CPU, of two samples with random latents and states."""
    model.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model.configure_model()
    model.on_fit_start()
    facts, cells = model.backbone.facts, side // model.backbone.facts.factor
    batch: dict[str, Any] = {
        "prompts": [""] * 2,
        "step": 0,
        "positions": [0, 1],
        "moments": torch.randn(2, 2 * facts.latent_channels, cells, cells),
        "text": torch.randn(2, facts.max_tokens, model.backbone.unet.config.cross_attention_dim),
    }
    meter = Meter([*model.parameters(), *model.buffers(), batch["moments"], batch["text"]])
    with meter:
        model.training_step(batch, 0).backward()
    return meter


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("method", [LoRA, Full])
def test_a_step_on_the_meta_device_costs_what_a_real_one_does(
    method: type[LoRA] | type[Full], products: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products:
        monkeypatch.setattr(cpu_convolution, "_WEIGHTS", 1)
    here = "hardware=cpu", "hardware.precision=32-true", "backbone=sd15", f"backbone.path={tiny}"
    found = figures(f"method={method.__name__.lower()}", "data.batch_size=2", *here)
    real = real_step(method(backbone=Pretrained(str(tiny))), side=32)
    assert found.plain.flop == real.flop
    # Put together, for nothing was put aside: the gradients stay.
    assert found.plain.together == pytest.approx(real.activations, rel=0.05)


def test_the_peak_holds_all_that_autograd_saves() -> None:
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(8, 64)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    with Meter([x, weight]) as meter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.linear(F.silu(F.linear(x, weight)), weight).square().sum()
        held = sum(saved.values()) - x.nbytes - weight.nbytes
        assert meter.live >= held >= 3 * x.nbytes
        loss.backward()
    assert meter.flop == 2 * 5 * 8 * 64 * 64
    del loss
    weight.grad = None
    saved.clear()
    assert meter.live == 0


def test_attention_keeps_no_score_matrix() -> None:
    q = torch.empty(1, 1, 4096, 8, device="meta", requires_grad=True)
    with Meter([q]) as meter, Kernels(gpu=True):
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert 0 < meter.activations < 4096 * 4096
    assert meter.flop == 2 * 4096 * 4096 * 8 * (2 + 5)


def test_norms_are_float32_on_a_gpu_and_products_are_not() -> None:
    x, weight = torch.empty(2, 8, device="meta"), torch.nn.Parameter(torch.empty(8, 8, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        for gpu, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            with Kernels(gpu):
                product = F.linear(x, weight)
                assert product.dtype == torch.bfloat16
                assert F.layer_norm(product, (8,)).dtype == dtype
    with Kernels(gpu=True):
        assert F.linear(x, weight).dtype == torch.float32


def test_figures_follow_the_config(tiny: Path, tmp_path: Path) -> None:
    wider = tmp_path / "wider"
    shutil.copytree(tiny, wider, ignore=shutil.ignore_patterns("*.safetensors"))
    file = wider / "unet" / "config.json"
    config = {**json.loads(file.read_text()), "block_out_channels": [24, 48]}
    file.write_text(json.dumps(config))
    before, after = (figures("method=full", "backbone=sd15", f"backbone.path={path}") for path in (tiny, wider))
    unet = UNet2DConditionModel.from_config(config)
    assert parts(after)["unet"] == sum(p.numel() for p in unet.parameters()) > parts(before)["unet"]
    assert after.plain.flop > 1.5 * before.plain.flop
    assert after.plain.activations > 1.3 * before.plain.activations
    assert after.state > before.state


def test_twice_the_batch_is_twice_the_work(tiny: Path) -> None:
    where = "backbone=sd15", f"backbone.path={tiny}"
    one, two = (figures(f"data.batch_size={size}", "method=lora", *where) for size in (1, 2))
    assert two.plain.flop == 2 * one.plain.flop
    assert two.plain.activations == pytest.approx(2 * one.plain.activations, rel=0.1)
    assert (two.state, two.artifact, two.encoding) == (one.state, one.artifact, one.encoding)


def test_checkpointing_saves_activations_for_work(full: TrainingCosts) -> None:
    assert full.checkpointed.activations < 0.75 * full.plain.activations
    assert full.plain.flop < full.checkpointed.flop < full.plain.flop + full.checkpointed.forward


def test_what_is_not_cached_is_encoded_in_the_step(tiny: Path) -> None:
    fixed = "method.targets=[cross_attention,text_encoder]", "backbone=sd15", f"backbone.path={tiny}"
    cached, fresh = (figures(*fixed, f"data.cache_latents={on}", f"data.cache_text={on}") for on in ("true", "false"))
    assert fresh.plain.forward > cached.plain.forward
    assert (cached.idle, fresh.idle) == (4 * parts(cached)["vae"], 0)  # the text encoder is trained
    assert cached.encoding > fresh.encoding == 0


@pytest.mark.parametrize("method", [LoRA, Full])
def test_the_artifact_has_the_size_that_was_planned(
    method: type[LoRA] | type[Full], tiny: Path, images: Path, tmp_path: Path
) -> None:
    model = method(backbone=Pretrained(str(tiny)))
    fit(model, folder_data(images), 1)
    model.artifact(tmp_path / "artifact", "it")
    written = 0
    for file in (tmp_path / "artifact").rglob("*.safetensors"):
        written += file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    assert model.artifact_bytes() <= written < 1.02 * model.artifact_bytes()  # kohya's form has an alpha a pair


def test_an_average_is_four_bytes_a_trained_parameter(tiny: Path) -> None:
    where = "method=lora", "backbone=sd15", f"backbone.path={tiny}"
    without, kept = (figures(*where, *own) for own in ((), ("callbacks=ema",)))
    assert (without.average, kept.average) == (0, 4 * kept.total.trained)
    plain, averaged = (memory(found, SWITCHES["plain"], 1, 1) for found in (without, kept))
    assert averaged.step - plain.step == averaged.previews - plain.previews == kept.average
    assert averaged.encoding == plain.encoding


def test_a_class_is_drawn_by_a_model_beside_the_one_that_is_trained(tiny: Path, tmp_path: Path) -> None:
    where = "method=dreambooth", "backbone=sd15", f"backbone.path={tiny}"
    drawn = figures(*where, "data.class_prompt=a dog")
    own = figures(*where, f"data.class_path={tmp_path}")
    none = figures(*where, "data.prior_weight=0")
    assert (own.drawing, none.drawing) == (0, 0)
    count = parts(drawn)
    halved = 2 * (count["unet"] + count["text_encoder"]) + 4 * count["vae"]
    # Sixty-four of 32 pixels at once, each latents and maps of several numbers a cell.
    assert halved < drawn.drawing < halved + 64 * 32 * 32 * 1024
    cost = memory(drawn, SWITCHES["plain"], 1, 1)
    assert cost.drawing == cost.weights + drawn.drawing == cost.peak


# --- what fits


def test_each_switch_saves_its_own(full: TrainingCosts) -> None:
    costs = {name: memory(full, switches, 1, 1) for name, switches in SWITCHES.items()}
    plain = costs["plain"]
    assert costs["gradient checkpointing"].activations < plain.activations
    assert costs["8-bit AdamW"].state < 0.26 * plain.state
    assert plain.weights - costs["offloading"].weights == full.idle
    assert min(costs.values(), key=lambda cost: cost.step) == costs["all of them"]
    assert plain.step < plain.weights + plain.state + plain.gradients + plain.activations


def test_gradients_that_wait_and_buckets_cost_memory(full: TrainingCosts) -> None:
    plain, waiting, shared = (memory(full, SWITCHES["plain"], *spread) for spread in ((1, 1), (2, 1), (1, 2)))
    assert waiting.step == plain.weights + plain.state + plain.gradients + plain.activations
    assert shared.step == plain.step + plain.gradients


@pytest.mark.parametrize(
    ("gib", "wanted"), [("1000", "plain"), ("12", "with 8-bit AdamW"), ("4", "no: ")], ids=["1000", "12", "4"]
)
def test_it_says_with_which_switches_it_fits(
    gib: str, wanted: str, full: TrainingCosts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_command, "count", lambda request: full)
    assert plan("methods=[full]", "backbone=sd15", f"fits={gib}") == 0
    head, line = capsys.readouterr().out.splitlines()[2:4]
    assert head.endswith(f"fits {gib} GiB")
    assert line.startswith("full ")
    assert wanted in line[line.rindex("GiB  ") if "no" not in wanted else 0 :]


# --- the command


@pytest.mark.slow
def test_it_needs_no_weights_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "20")
    assert plan("method=full", "backbone=sdxl", "data.batch_size=1", "callbacks.samples=null") == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0] == "full on sdxl: 1024x1024 pixels, batch 1, bf16-mixed, 1 GPU"
    unet = next(line for line in lines if line.startswith("unet"))
    assert unet.split()[:4] == ["unet", "0", "2,567,463,684", "2,567,463,684"]
    assert next(line for line in lines if line.startswith("total")).split()[3] == "3,468,837,867"
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_is_planned_as_it_stands(
    full: TrainingCosts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[plan_command.CheckedPlan] = []
    monkeypatch.setattr(plan_command, "plan_request", asked.append)
    monkeypatch.setattr(plan_command, "count", lambda request: full)
    assert plan("experiment=lora_subject") == 0
    assert capsys.readouterr().out.startswith("lora on pocket: 64x64 pixels, batch 8, bf16-mixed, 1 GPU")
    assert asked[0].config["method"]["rank"] == 16


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_planned(recipe: str) -> None:
    config = compose("plan", search_path(None), [f"experiment={recipe}"])
    assert plan_command.checked_plan(config).count > 0


@pytest.mark.slow
def test_all_methods_are_a_table_yours_too(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text("defaults: [lora]\nrank: 3\n")
    where = "backbone=sd15", f"backbone.path={tiny}", "-cd", str(tmp_path / "conf")
    assert plan("methods=all", "data=folder", *where) == 0  # the data's folder is not named, and not needed
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[3:] if line[:1].strip()}
    assert list(rows)[: len(METHODS) + 1] == sorted([*METHODS, "mine"])
    assert int(rows["mine"].replace(",", "")) * 8 == int(rows["lora"].replace(",", "")) * 3


REFUSED = {
    ("methods=[lroa]",): "methods: lroa: there is no such method; did you mean lora?",
    ("methods=[]",): "methods: []: ",
    ("fits=0",): "fits: 0: ",
    ("data.resolution=65",): "data.resolution: 65 is not a multiple of 4",
    ("data.batch_size=3", "hardware=ddp"): "data.batch_size: 3 samples per step cannot be shared out",
    ("data.batch_size=0",): "data.batch_size: 0: ",
    ("trainer.accumulate_grad_batches=0",): "trainer.accumulate_grad_batches: 0: ",
    ("methods=[lora,full]", "method.rank=4"): "method.rank: there is no such setting",
    ("method.rank=0",): "method.rank: 0: ",
    ("hardware.precision=fp8",): "hardware.precision: 'fp8'",
    ("backbone=sd15", "backbone.path=/no/such"): "backbone.path: /no/such does not exist",
    ("-m", "fits=1,2"): "--multirun: sdtune plan runs once",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_refusals_are_one_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"sdtune: {REFUSED[arguments]}")
    assert (said.err.count("\n"), said.out) == (1, "")


@pytest.mark.parametrize(
    ("more", "words"), [((), "is missing"), (("backbone.path={shipped}",), "text_encoder holds no diffusion_pytorch")]
)
def test_configs_alone_are_planned_and_not_trained(
    more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("backbone=sdxl", *(word.format(shipped=shipped("sdxl")) for word in more)) == 2
    said = capsys.readouterr().err
    assert said.startswith("sdtune: backbone.path")
    assert words in said
    assert said.count("\n") == 1


def test_an_optimizer_that_looks_at_its_sums_is_counted(tiny: Path) -> None:
    """Prodigy: two moments, the sum that its estimate divides by, and the initial weights."""
    found = figures("method=lora", "optimizer=prodigy", "backbone=sd15", f"backbone.path={tiny}")
    assert found.state == pytest.approx(4 * 4 * found.total.trained, rel=0.01)


def test_a_prompt_may_be_as_long_as_is_said(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("backbone=sd15", f"backbone.path={tiny}", "backbone.max_tokens=150", "hardware=cpu") == 0
    assert "secrets" not in capsys.readouterr().err
