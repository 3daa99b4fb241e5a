"""``sdtune plan``: costs measured on the meta device, compared with published numbers and with real training steps."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
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
from sdtune.backbone.single_file import included_configs
from sdtune.commands import plan as plan_command
from sdtune.commands.plan import most_expensive
from sdtune.conditioning import Conditioning
from sdtune.config.compose import compose, search_path
from sdtune.methods import Full, LoRA
from sdtune.paths import config_folder
from sdtune.planning.kernels import Kernels
from sdtune.planning.measure import GenerationCost, TrainingCosts
from sdtune.planning.memory import SWITCHES, Switches, memory
from sdtune.planning.meter import Meter
from sdtune.planning.request import count as count_costs

METHODS = sorted(path.stem for path in (config_folder() / "method").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))
GIB = 1024**3


def training_costs(*overrides: str) -> TrainingCosts:
    config = compose("plan", search_path(None), list(overrides))
    return count_costs(plan_command.plan_request(plan_command.checked_plan(config)))


def parts(costs: TrainingCosts) -> dict[str, int]:
    """Component -> number of parameters, frozen or trained."""
    return {part.name: part.frozen + part.trained for part in costs.components}


@pytest.fixture(scope="module")
def full() -> TrainingCosts:
    """Costs of training the full UNet of SD 1.5 with batch size 1."""
    return training_costs("backbone=sd15", "method=full", "data.batch_size=1", "callbacks.samples=null")


# --- published sizes of the models


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("sd15", {"denoiser": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}),
        ("sd21", {"denoiser": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}),
        ("sdxl", {"denoiser": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
    ],
)
def test_shipped_configs_have_the_sizes_of_the_models(group: str, expected: dict[str, int]) -> None:
    backbone = MetaPretrained(str(included_configs(group))).load()
    for name, count in expected.items():
        parameters = list(getattr(backbone, name).parameters())
        assert sum(p.numel() for p in parameters) == count
        assert {p.device.type for p in parameters} == {"meta"}
    assert backbone.facts.side == {"sd15": 512, "sd21": 768, "sdxl": 1024}[group]
    assert backbone.path.prediction_type == ("v_prediction" if group == "sd21" else "epsilon")


def test_forward_pass_of_the_sd15_unet_has_401_6_gmac(full: TrainingCosts) -> None:
    assert full.plain.forward / 2 == pytest.approx(401.6e9, rel=1e-3)
    # The backward pass has 2x the FLOP of the forward pass, and 2.5x for attention, which recomputes its scores.
    assert 3 <= full.plain.flop / full.plain.forward < 3.2


def test_full_fine_tuning_costs_are_exact_to_the_byte(full: TrainingCosts) -> None:
    assert parts(full) == {"denoiser": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}
    assert (full.total.trained, full.total.frozen) == (859_520_964, 123_060_480 + 83_653_863)
    assert full.gradients == 4 * 859_520_964
    assert 8 * 859_520_964 <= full.state < 8.001 * 859_520_964
    assert full.artifact == 4 * (859_520_964 + 123_060_480 + 83_653_863)
    assert full.total.bytes == 4 * 859_520_964 + 2 * 123_060_480 + 4 * 83_653_863
    assert full.idle == 2 * 123_060_480 + 4 * 83_653_863


def test_lora_of_rank_1_has_199_296_parameters() -> None:
    adapter = LoRA(rank=1, backbone=MetaPretrained(str(included_configs("sd15"))))
    with torch.device("meta"):
        adapter.configure_model()
    assert sum(p.numel() for _, p in adapter.trainable()) == 199_296
    assert {p.device.type for p in adapter.parameters()} == {"meta"}


# --- comparison with real models and steps


@pytest.mark.parametrize("method", [LoRA, Full])
def test_planned_sizes_equal_those_of_the_loaded_pocket_model(method: type[LoRA] | type[Full]) -> None:
    costs = training_costs(f"method={method.__name__.lower()}")
    loaded = method(backbone=Pretrained())
    loaded.configure_model()
    expected = {name: sum(p.numel() for p in part.parameters()) for name, part in loaded.backbone.named_children()}
    assert parts(costs) == expected
    assert costs.total.trained == sum(p.numel() for _, p in loaded.trainable())


def real_step(model: LoRA | Full, side: int) -> Meter:
    """Measure a training step on the CPU with two samples of random latents and text embeddings."""
    model.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model.configure_model()
    model.on_fit_start()
    facts, cells = model.backbone.facts, side // model.backbone.facts.factor
    batch: dict[str, Any] = {
        "prompts": [""] * 2,
        "step": 0,
        "positions": [0, 1],
        "moments": torch.randn(2, 2 * facts.latent_channels, cells, cells),
        "conditions": {},
        "conditioning": Conditioning(torch.randn(2, *model.backbone.text_shapes["states"])),
    }
    meter = Meter([*model.parameters(), *model.buffers(), batch["moments"], batch["conditioning"].states])
    with meter:
        model.training_step(batch, 0).backward()
    return meter


@pytest.mark.parametrize("matmul_convolutions", [False, True])
@pytest.mark.parametrize("method", [LoRA, Full])
def test_step_on_the_meta_device_costs_as_much_as_a_real_step(
    method: type[LoRA] | type[Full], matmul_convolutions: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if matmul_convolutions:
        monkeypatch.setattr(cpu_convolution, "_WEIGHTS", 1)
    settings = "hardware=cpu", "hardware.precision=32-true", "backbone=sd15", f"backbone.path={tiny}"
    costs = training_costs(f"method={method.__name__.lower()}", "data.batch_size=2", *settings)
    real = real_step(method(backbone=Pretrained(str(tiny))), side=32)
    assert costs.plain.flop == real.flop
    # The real step leaves gradients in memory, so compare with the peak that includes them.
    assert costs.plain.together == pytest.approx(real.activations, rel=0.05)


def test_peak_includes_all_tensors_saved_by_autograd() -> None:
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


def test_attention_saves_no_score_matrix() -> None:
    q = torch.empty(1, 1, 4096, 8, device="meta", requires_grad=True)
    with Meter([q]) as meter, Kernels(gpu=True):
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert 0 < meter.activations < 4096 * 4096
    assert meter.flop == 2 * 4096 * 4096 * 8 * (2 + 5)


def test_norms_are_float32_and_matmuls_bfloat16_on_a_gpu() -> None:
    x, weight = torch.empty(2, 8, device="meta"), torch.nn.Parameter(torch.empty(8, 8, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        for gpu, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            with Kernels(gpu):
                product = F.linear(x, weight)
                assert product.dtype == torch.bfloat16
                assert F.layer_norm(product, (8,)).dtype == dtype
    with Kernels(gpu=True):
        assert F.linear(x, weight).dtype == torch.float32


@pytest.mark.slow
def test_costs_grow_with_the_unet_config(tiny: Path, tmp_path: Path) -> None:
    wider = tmp_path / "wider"
    shutil.copytree(tiny, wider, ignore=shutil.ignore_patterns("*.safetensors"))
    file = wider / "unet" / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), "block_out_channels": [24, 48]}
    file.write_text(json.dumps(config), encoding="utf-8")
    before, after = (training_costs("method=full", "backbone=sd15", f"backbone.path={path}") for path in (tiny, wider))
    unet = UNet2DConditionModel.from_config(config)
    assert parts(after)["denoiser"] == sum(p.numel() for p in unet.parameters()) > parts(before)["denoiser"]
    assert after.plain.flop > 1.5 * before.plain.flop
    assert after.plain.activations > 1.3 * before.plain.activations
    assert after.state > before.state


@pytest.mark.slow
def test_twice_the_batch_costs_twice_the_compute(tiny: Path) -> None:
    settings = "backbone=sd15", f"backbone.path={tiny}"
    one, two = (training_costs(f"data.batch_size={size}", "method=lora", *settings) for size in (1, 2))
    assert two.plain.flop == 2 * one.plain.flop
    assert two.plain.activations == pytest.approx(2 * one.plain.activations, rel=0.1)
    assert (two.state, two.artifact, two.encoding) == (one.state, one.artifact, one.encoding)


def test_gradient_checkpointing_trades_compute_for_activations(full: TrainingCosts) -> None:
    assert full.checkpointed.activations < 0.75 * full.plain.activations
    assert full.plain.flop < full.checkpointed.flop < full.plain.flop + full.checkpointed.forward


@pytest.mark.slow
def test_uncached_inputs_are_encoded_in_the_step(tiny: Path) -> None:
    settings = "method.targets=[cross_attention,text_encoder]", "backbone=sd15", f"backbone.path={tiny}"
    cached, fresh = (
        training_costs(*settings, f"data.cache_latents={on}", f"data.cache_text={on}") for on in ("true", "false")
    )
    assert fresh.plain.forward > cached.plain.forward
    assert (cached.idle, fresh.idle) == (4 * parts(cached)["vae"], 0)  # the text encoder is trained
    assert cached.encoding > fresh.encoding == 0


@pytest.mark.parametrize("method", [LoRA, Full])
def test_artifact_has_the_planned_size(
    method: type[LoRA] | type[Full], tiny: Path, images: Path, tmp_path: Path
) -> None:
    model = method(backbone=Pretrained(str(tiny)))
    fit(model, folder_data(images), 1)
    model.artifact(tmp_path / "artifact", "it")
    written_bytes = 0
    for file in (tmp_path / "artifact").rglob("*.safetensors"):
        written_bytes += file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    assert model.artifact_bytes() <= written_bytes < 1.02 * model.artifact_bytes()  # kohya's format also stores alphas


@pytest.mark.slow
def test_ema_costs_four_bytes_per_trained_parameter(tiny: Path) -> None:
    settings = "method=lora", "backbone=sd15", f"backbone.path={tiny}"
    without, with_ema = (training_costs(*settings, *more) for more in ((), ("callbacks=ema",)))
    assert (without.average, with_ema.average) == (0, 4 * with_ema.total.trained)
    plain, averaged = (memory(costs, SWITCHES["plain"], 1, 1) for costs in (without, with_ema))
    assert averaged.step - plain.step == with_ema.average
    assert averaged.previews == plain.previews  # on a GPU, the trained weights wait in main memory
    assert averaged.encoding == plain.encoding


@pytest.mark.slow
def test_class_images_are_generated_before_the_model_is_loaded(tiny: Path, tmp_path: Path) -> None:
    settings = "method=dreambooth", "backbone=sd15", f"backbone.path={tiny}"
    generated = training_costs(*settings, "data.class_prompt=a dog")
    from_folder = training_costs(*settings, f"data.class_path={tmp_path}")
    none = training_costs(*settings, "data.prior_weight=0")
    assert (from_folder.class_images, none.class_images) == (None, None)
    assert generated.class_images is not None
    count = parts(generated)
    assert generated.class_images.weights == 2 * count["denoiser"] + 4 * count["vae"]
    assert generated.class_images.encoders == 2 * count["text_encoder"]
    # The upper bound allows 1024 bytes of latents and activations per pixel, for 64 images of 32x32 in one batch.
    assert 0 < generated.class_images.single < generated.class_images.activations < 64 * 32 * 32 * 1024
    cost = memory(generated, SWITCHES["plain"], 1, 1)
    assert cost.class_images == generated.class_images.peak


# --- memory limits


def test_each_switch_saves_the_memory_that_it_controls(full: TrainingCosts) -> None:
    costs = {name: memory(full, switches, 1, 1) for name, switches in SWITCHES.items()}
    plain = costs["plain"]
    assert costs["gradient checkpointing"].activations < plain.activations
    assert costs["8-bit AdamW"].state < 0.26 * plain.state
    assert plain.weights - costs["offloading"].weights == full.idle
    assert min(costs.values(), key=lambda cost: cost.step) == costs["all of them"]
    assert plain.step < plain.weights + plain.state + plain.gradients + plain.activations


def test_accumulated_gradients_and_ddp_buckets_cost_memory(full: TrainingCosts) -> None:
    plain, accumulated, ddp = (memory(full, SWITCHES["plain"], *counts) for counts in ((1, 1), (2, 1), (1, 2)))
    assert accumulated.step == plain.weights + plain.state + plain.gradients + plain.activations
    assert ddp.step == plain.step + plain.gradients


def test_gpu_without_memory_for_a_batch_of_images_needs_that_of_one(full: TrainingCosts) -> None:
    large = GenerationCost(weights=1, encoders=2, activations=10**15, single=3)
    cost = memory(replace(full, evaluation=large, gpu=True), SWITCHES["plain"], 1, 1)
    assert cost.evaluation == cost.peak == 10**15 + 1
    assert cost.least == max(cost.step, cost.encoding)
    assert memory(replace(full, evaluation=large, gpu=False), SWITCHES["plain"], 1, 1).least == 10**15 + 1


def test_offloaded_text_encoders_are_on_the_device_only_for_the_prompts(full: TrainingCosts) -> None:
    costs = replace(full, idle_text=100, previews=10, single_preview=10, average=0)
    plain, offloaded = (memory(costs, switches, 1, 1) for switches in (Switches(), Switches(offload=True)))
    assert plain.previews == costs.total.bytes + costs.state + 10
    assert offloaded.previews == costs.total.bytes + costs.state


@pytest.mark.parametrize(
    ("gib", "advice"),
    [
        (1.2, "to fit 1.2 GiB, add: hardware.gradient_checkpointing=true"),
        (1.1, "to fit 1.1 GiB, add: trainer.accumulate_grad_batches=2 hardware.gradient_checkpointing=true"),
        pytest.param(
            1.03,
            "to fit 1.03 GiB, add: trainer.accumulate_grad_batches=4 data.resolution=",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            1.001,
            "does not fit: at this resolution and micro-batch it needs at least ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_switches_then_accumulation_then_resolution_are_proposed(
    gib: float, advice: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["method=lora", "backbone=sd15", f"backbone.path={tiny}", "data.batch_size=4", "data.resolution=512"]
    assert plan(*settings, "data.cache_latents=false", "callbacks.samples=null", f"fits={gib}") == 0
    assert any(line.startswith(advice) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"average": 100 * GIB}, "to fit 20 GiB, add: callbacks.ema=null"),
        ({"evaluation": GenerationCost(0, 0, 100 * GIB, 100 * GIB)}, "to fit 20 GiB, add: evaluation=none"),
        (
            {"average": 100 * GIB, "evaluation": GenerationCost(0, 0, 100 * GIB, 100 * GIB)},
            "to fit 20 GiB, add: callbacks.ema=null evaluation=none",
        ),
        (
            {"class_images": GenerationCost(0, 0, 100 * GIB, 100 * GIB)},
            "does not fit: at this resolution and micro-batch it needs at least 101.00 GiB, for generating",
        ),
        (
            {"class_images": GenerationCost(0, 0, 100 * GIB, 1), "state": 90 * GIB, "state_8bit": 90 * GIB},
            "does not fit: at this resolution and micro-batch it needs at least 9",
        ),
    ],
)
def test_ema_and_evaluation_are_omitted_if_that_makes_it_fit(
    changes: dict[str, Any],
    advice: str,
    full: TrainingCosts,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At an unchanged resolution, and with the micro-batch of the settings."""
    monkeypatch.setattr(plan_command, "count", lambda request: replace(full, gpu=True, **changes))
    assert plan("method=full", "backbone=sd15", "fits=20") == 0
    assert any(line.startswith(advice) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("gib", "expected"), [("1000", "plain"), ("12", "with 8-bit AdamW"), ("4", "no: ")], ids=["1000", "12", "4"]
)
def test_plan_prints_the_switches_with_which_it_fits(
    gib: str, expected: str, full: TrainingCosts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_command, "count", lambda request: full)
    assert plan("methods=[full]", "backbone=sd15", f"fits={gib}") == 0
    head, line = capsys.readouterr().out.splitlines()[2:4]
    assert head.endswith(f"fits {gib} GiB")
    assert line.startswith("full ")
    assert expected in line[line.rindex("GiB  ") if "no" not in expected else 0 :]


@pytest.mark.parametrize(
    ("gib", "advice"),
    [
        ("1000", None),
        ("12", "to fit 12 GiB, add: optimizer=adamw8bit"),
        ("4", "does not fit: at this resolution and micro-batch it needs at least "),
    ],
)
def test_plan_of_one_method_advises_how_to_fit(
    gib: str,
    advice: str | None,
    full: TrainingCosts,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plan_command, "count", lambda request: full)
    assert plan("method=full", "backbone=sd15", f"fits={gib}") == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith(("to fit", "does not fit"))]
    assert len(found) == (advice is not None)
    assert advice is None or found[0].startswith(advice)
    assert next(line for line in lines if line.startswith("these settings (plain): peak ")).endswith(
        " fits 1000 GiB"
    ) == (advice is None)


def test_plan_names_the_memory_settings_that_are_on(
    full: TrainingCosts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not advised again."""
    monkeypatch.setattr(plan_command, "count", lambda request: full)
    settings = ["hardware.gradient_checkpointing=true", "optimizer=adamw8bit"]
    assert plan("method=full", "backbone=sd15", *settings, "fits=12") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        re.match(r"these settings \(gradient checkpointing, 8-bit AdamW\): peak .*, fits 12 GiB", x) for x in lines
    )
    assert not any(line.startswith("to fit") for line in lines)
    assert plan("method=full", "backbone=sd15", settings[0], "fits=12") == 0
    assert "to fit 12 GiB, add: optimizer=adamw8bit" in capsys.readouterr().out.splitlines()


# --- the command


@pytest.mark.slow
def test_plan_needs_no_weights_and_writes_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "20")
    assert plan("method=full", "backbone=sdxl", "data.batch_size=1", "callbacks.samples=null") == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    assert lines[0] == "full on sdxl: 1024x1024 pixels, batch 1, bf16-mixed, 1 GPU"
    unet = next(line for line in lines if line.startswith("denoiser"))
    assert unet.split()[:4] == ["denoiser", "0", "2,567,463,684", "2,567,463,684"]
    assert next(line for line in lines if line.startswith("total")).split()[3] == "3,468,837,867"
    assert list(tmp_path.iterdir()) == []


def test_recipe_is_planned_without_changes(
    full: TrainingCosts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans: list[plan_command.CheckedPlan] = []
    monkeypatch.setattr(plan_command, "plan_request", plans.append)
    monkeypatch.setattr(plan_command, "count", lambda request: full)
    assert plan("experiment=lora_subject") == 0
    assert capsys.readouterr().out.startswith("lora on pocket: 64x64 pixels, batch 8, bf16-mixed, 1 GPU")
    assert plans[0].config["method"]["rank"] == 16


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_planned(recipe: str) -> None:
    config = compose("plan", search_path(None), [f"experiment={recipe}"])
    assert plan_command.checked_plan(config).count > 0


@pytest.mark.slow
def test_all_methods_are_a_table_including_user_methods(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text("defaults: [lora]\nrank: 3\n", encoding="utf-8")
    settings = "backbone=sd15", f"backbone.path={tiny}", "-cd", str(tmp_path / "conf")
    assert plan("methods=all", "data=folder", *settings) == 0  # data.path is missing, because plan does not need it
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[3:] if line[:1].strip()}
    assert list(rows)[: len(METHODS) + 1] == sorted([*METHODS, "mine"])
    assert int(rows["mine"].replace(",", "")) * 8 == int(rows["lora"].replace(",", "")) * 3


INVALID = {
    ("methods=[lroa]",): "methods: unknown method lroa; did you mean lora?",
    ("methods=[]",): "methods: got []",
    ("fits=0",): "fits: got 0; expected float > 0 or null",
    ("data.resolution=65",): "data.resolution: 65 is not a multiple of 4",
    ("data.batch_size=3", "hardware=ddp"): "data.batch_size: 3 samples per step cannot be divided",
    ("data.batch_size=0",): "data.batch_size: got 0; expected int >= 1",
    ("trainer.accumulate_grad_batches=0",): "trainer.accumulate_grad_batches: got 0; expected int >= 1",
    ("methods=[lora,full]", "method.rank=4"): "method.rank: unknown setting",
    ("method.rank=0",): "method.rank: got 0; expected int >= 1 or null",
    ("hardware.precision=fp8",): "hardware.precision: 'fp8'",
    ("backbone=sd15", "backbone.path=/no/such"): "backbone.path: /no/such does not exist",
    ("-m", "fits=1,2"): "--multirun: sdtune plan supports no sweeps",
}


@pytest.mark.parametrize("arguments", INVALID, ids=" ".join)
def test_invalid_arguments_print_one_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"sdtune: {INVALID[arguments]}")
    assert (output.err.count("\n"), output.out) == (1, "")


@pytest.mark.parametrize(
    ("more", "expected"),
    [((), "missing value"), (("backbone.path={configs}",), "text_encoder contains no diffusion_pytorch")],
)
def test_shipped_configs_without_weights_cannot_be_trained(
    more: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("backbone=sdxl", *(word.format(configs=included_configs("sdxl")) for word in more)) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("sdtune: backbone.path")
    assert expected in stderr
    assert stderr.count("\n") == 1


def test_optimizer_state_of_prodigy_is_counted(tiny: Path) -> None:
    """Prodigy stores two moments, the denominator of its estimate, and the initial weights."""
    costs = training_costs("method=lora", "optimizer=prodigy", "backbone=sd15", f"backbone.path={tiny}")
    assert costs.state == pytest.approx(4 * 4 * costs.total.trained, rel=0.01)


def test_max_tokens_is_not_mistaken_for_a_secret(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("backbone=sd15", f"backbone.path={tiny}", "backbone.max_tokens=150", "hardware=cpu") == 0
    assert "secrets" not in capsys.readouterr().err


def test_phase_that_does_not_fit_is_that_of_one_image_at_a_time(full: TrainingCosts) -> None:
    """A batch of images that does not fit is generated in smaller ones, so its peak does not count."""
    costs = replace(full, gpu=True, evaluation=GenerationCost(0, 0, 10**15, 5))
    assert memory(costs, SWITCHES["plain"], 1, 1).least_phase == "step"
    single = replace(costs, evaluation=GenerationCost(0, 0, 10**15, 10**14))
    assert memory(single, SWITCHES["plain"], 1, 1).least_phase == "evaluation"


DATA = {"resolution": None, "cache_text": True, "class_prompt": None, "class_path": None, "prior_weight": 1.0}


def test_plan_of_a_mix_counts_its_most_expensive_source() -> None:
    sources = {
        "a": {"path": "x", "class_prompt": "a dog"},
        "b": {"path": "y", "resolution": [512, 768]},
        "c": {"path": "z", "class_path": "dogs", "prior_weight": 0.5},
    }
    planned = most_expensive(DATA, {"sources": sources})
    assert planned == {**DATA, "resolution": 768, "class_prompt": "a dog"}
    assert most_expensive({**DATA, "resolution": [512, 1024]}, {}) == {**DATA, "resolution": 1024}
    without_prior = {"a": {"class_prompt": "a dog", "prior_weight": 0}}
    assert most_expensive(DATA, {"sources": without_prior}) == DATA


def test_plan_keeps_the_text_encoder_for_captions_that_are_drawn() -> None:
    drawn, text = {"kind": "tags", "shuffle": True}, {"kind": "tags", "caption_tag_dropout_rate": 0.0}
    assert most_expensive(DATA, {"captions": drawn}) == {**DATA, "cache_text": False}
    assert most_expensive(DATA, {"captions": text}) == DATA
    assert not most_expensive(DATA, {"captions": text, "sources": {"a": {"captions": drawn}, "b": {}}})["cache_text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "count", "trained"),
    [
        ("sd3_medium", "2,028,328,000", "9,338,880"),
        ("sd35_medium", "2,243,171,520", "11,894,784"),
        ("sd35_large", "8,056,627,520", "23,502,848"),
    ],
)
def test_plan_prints_the_true_sizes_of_sd3(
    backbone: str, count: str, trained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("method=lora", "method.rank=16", f"backbone={backbone}", "callbacks.samples=null") == 0
    lines = capsys.readouterr().out.splitlines()
    transformer = next(line for line in lines if line.startswith("denoiser"))
    assert count in transformer
    assert trained in transformer
    t5 = next(line for line in lines if line.startswith("text_encoder_3"))
    assert "4,762,310,656" in t5
    assert any(line.startswith("text_encoder_3: ") and "wait in main memory" in line for line in lines)
