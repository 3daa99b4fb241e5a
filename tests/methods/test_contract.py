"""Contract tests that every method must pass; the methods are discovered in ``conf/method``.

A new method is tested without changes here, unless its command needs more settings than a new token, or its gradients
need more steps to become nonzero.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import SingleDeviceStrategy
from safetensors.torch import load_file
from torch import Tensor

from families import FAMILIES, SD3_FAMILIES, build_family, build_sd3
from method_cases import METHODS, MORE, MORE_OF_SD3, WORD, Case
from running import Spy, arguments, fit, rows, train
from sdtune.backbone import Pretrained
from sdtune.callbacks import EMA
from sdtune.data.control.base import map_to_tensor
from sdtune.objective import Timesteps
from sdtune.sampling.loop import Request, Sampling, generate
from sdtune.sampling.run_models import RunModels
from sdtune.training.random_draws import times as random_times


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folder with five captioned images that contain edges."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        pixels = np.full((144, 160, 3), 30 * i, dtype=np.uint8)
        pixels[24 + 4 * i : 96, 32 : 80 + 12 * i] = (250, 40 * i, 90)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}", encoding="utf-8")
    return folder


class Float32Unet(Case):
    """A subclass of a method that loads the UNet in float32 (``denoiser_is_read_only = False``)."""

    @property
    def kind(self) -> Any:
        return type("Float32Unet", (super().kind,), {"denoiser_is_read_only": False})


PLAIN = [Case(name) for name in METHODS]


def _quick(case: Case, family: str) -> bool:
    """Whether the case runs in ``make test``; the others run in ``make test-slow``."""
    return family == "tiny" or (family == "sdxl" and case.kind.trains_only_new_tokens)


def _families(names: Sequence[str], more: dict[str, list[Case]]) -> list[Any]:
    """Each family with each method, and with the cases ``more`` of the family."""
    return [
        pytest.param(case, family, id=f"{case}-{family}", marks=() if _quick(case, family) else pytest.mark.slow)
        for family in names
        for case in [*PLAIN, *more.get(family, MORE)]
    ]


every_family = pytest.mark.parametrize(
    ("case", "family"),
    _families(("tiny", *FAMILIES, *SD3_FAMILIES), dict.fromkeys(SD3_FAMILIES, MORE_OF_SD3)),
)
every_unet = pytest.mark.parametrize(("case", "family"), _families(("tiny", *FAMILIES), {}))
"""SD 3 has its own comparison with plain diffusers in test_sd3.py."""
every_method = pytest.mark.parametrize("case", PLAIN, ids=str)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def built(family: Any) -> Path:
        build_one: Any = build_sd3 if family in SD3_FAMILIES else build_family
        return build_one(tmp_path_factory.mktemp(family), family)

    return cache(built)


@pytest.fixture
def folder(family: str, tiny: Path, build: Any) -> Path:
    """Folder of a backbone: the tiny one of most tests, or one with the module structure of its family."""
    return tiny if family == "tiny" else build(family)


def frozen_tensors(model: Any, trainable_names: set[str]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if key not in trainable_names}


# --- trained and frozen tensors


@every_family
def test_all_trainable_tensors_get_gradients_and_frozen_ones_are_unchanged(
    case: Case, folder: Path, images: Path
) -> None:
    steps = 3  # with two zero convolutions in series, the layers before them get gradients only in the third step
    model, spy = case.model(folder), Spy()
    model.configure_model()
    trainable_names = {name for name, _ in model.trainable()}
    before = frozen_tensors(model, trainable_names)
    fit(model, case.data(folder, images), steps, [spy])
    assert {name for name, _ in model.trainable()} == trainable_names
    without_gradient = [name for name, gradient in spy.gradients[-1].items() if not gradient.any()]
    assert not without_gradient
    after = frozen_tensors(model, trainable_names)
    assert before.keys() == after.keys()
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert not changed


@every_family
def test_untrained_method_predicts_exactly_like_the_backbone(case: Case, folder: Path) -> None:
    model, base = case.model(folder), Pretrained(str(folder)).load()
    base.prepare_for_device(torch.device("cpu"))
    model.configure_model()
    model.prepare_for_device(torch.device("cpu"))
    model.eval()
    rng, side, factor = torch.Generator().manual_seed(0), base.facts.side, base.facts.factor
    noisy, maps = (
        torch.randn(2, 4, side // factor, side // factor, generator=rng),
        torch.rand(2, 3, side, side, generator=rng),
    )
    timesteps, prompts = torch.tensor([5, 800]), ["a fox", ""]
    with torch.no_grad():
        encode = model.condition_encoder or dict
        output = model.denoise(noisy, timesteps, model.backbone.encode_text(prompts), encode({"control": maps}))
        expected = base.predict(noisy, timesteps, base.encode_text(prompts))
    # Not torch.equal: the two copies of the weights may be aligned differently, which changes the last bit in MKL.
    assert float((output - expected).abs().max()) <= 1e-6


@every_method
def test_new_modules_are_created_on_the_device_of_the_loaded_weights(case: Case, tiny: Path) -> None:
    """Not on Lightning's default device (the run's device), which may lack memory for float32 weights."""
    model = case.model(tiny)
    with torch.device("meta"):
        model.configure_model()
    tables = model.backbone.path.schedule.alphas_cumprod
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers(), tables]} == {"cpu"}


@every_method
def test_frozen_weights_are_cast_before_they_move_to_the_device(case: Case, tiny: Path, images: Path) -> None:
    frozen_dtypes: dict[str, torch.dtype] = {}

    class RecordingStrategy(SingleDeviceStrategy):
        def model_to_device(self) -> None:
            frozen_dtypes.update({name: p.dtype for name, p in self.model.named_parameters() if not p.requires_grad})
            super().model_to_device()

    fit(case.model(tiny), case.data(tiny, images), 1, strategy=RecordingStrategy("cpu"), precision="bf16-mixed")
    assert any(name.startswith("backbone.text_encoder.") for name in frozen_dtypes)
    not_cast = {name for name, dtype in frozen_dtypes.items() if dtype != torch.bfloat16}
    assert not_cast == {name for name in frozen_dtypes if name.startswith("backbone.vae.")}


@every_method
def test_unet_that_is_only_read_is_loaded_in_half_precision(
    case: Case, tiny: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training gives bit-identical weights if the UNet is loaded in float32 and cast afterwards."""
    denoiser_dtypes, load = [], Pretrained.load

    def recording_load(self: Pretrained, seed: int = 0, denoiser: torch.dtype | None = None) -> Any:
        denoiser_dtypes.append(denoiser)
        return load(self, seed, denoiser)

    def train_tensors() -> dict[str, Tensor]:
        model = case.model(tiny)
        fit(model, case.data(tiny, images), 3, precision="bf16-mixed")
        return dict(model.trainable())

    monkeypatch.setattr(Pretrained, "load", recording_load)
    trained = train_tensors()
    assert denoiser_dtypes[0] == (torch.bfloat16 if case.kind.denoiser_is_read_only else None)
    if case.kind.denoiser_is_read_only:
        case = Float32Unet(case.name, case.settings)
    denoiser_dtypes.clear()
    reference = train_tensors()
    assert denoiser_dtypes[0] is None
    assert all(
        tensor.dtype == torch.float32 and torch.equal(tensor, reference[name]) for name, tensor in trained.items()
    )


# --- loss and gradients


class RecordLosses(Callback):
    """Records the last batch and the loss of each of its samples."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = {**batch}
        with torch.no_grad():
            self.losses = pl_module.losses(self.batch)  # also stores the moments in the batch


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product; the kernels of convolutions are flattened to matrices."""
    return left.flatten(1) @ right.flatten(1)


def merge(model: Any, pipe: Any) -> None:
    """Add B A of each LoRA pair to its weight in ``pipe``."""
    trainable = {name.removeprefix("backbone."): p.detach() for name, p in model.trainable()}
    for name in (name for name in trainable if name.endswith(".lora_A.default.weight")):
        component, path = name.removesuffix(".lora_A.default.weight").split(".", 1)
        weight = getattr(pipe, "unet" if component == "denoiser" else component).get_submodule(path).weight
        weight.data += product(trainable[name.replace("lora_A", "lora_B")], trainable[name]).view(weight.shape)


def add_noise_to_trainable(model: Any) -> None:
    """Add noise to all trainable tensors, so that modules initialized to zero have an effect."""
    rng = torch.Generator().manual_seed(0)
    for _, parameter in model.trainable():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)


class DiffusersStep:
    """The same training step with plain diffusers modules, loaded from the backbone's folder and the artifact."""

    def __init__(self, case: Case, model: Any, batch: Any, folder: Path, artifact: Path) -> None:
        model.artifact(artifact, "it")
        pipeline = artifact / "it" if (artifact / "it" / "model_index.json").is_file() else folder
        pipe: Any = DiffusionPipeline.from_pretrained(pipeline, local_files_only=True)
        merge(model, pipe)
        if case.kind.trains_only_new_tokens:
            self._load_new_token(pipe, artifact)
        text, conditions = self._conditions(pipe, batch)
        mean, log_variance = batch["moments"].chunk(2, dim=1)
        shape = (4, *mean.shape[2:])
        vae_noise = model.noise(shape, "train/vae", 0, batch["positions"])
        clean = (mean + (0.5 * log_variance).exp() * vae_noise) * pipe.vae.config.scaling_factor
        noise = model.noise(shape, "train/noise", 0, batch["positions"])
        times = random_times(model.backbone.path, Timesteps(), 0, "train", 0, batch["positions"], torch.device("cpu"))
        noisy = pipe.scheduler.add_noise(clean, noise, times)
        models, residuals = {"denoiser": pipe.unet, "text_encoder": pipe.text_encoder}, {}
        if hasattr(pipe, "text_encoder_2"):
            models["text_encoder_2"] = pipe.text_encoder_2
        if (artifact / "it" / "config.json").is_file():
            models["controlnet"] = net = ControlNetModel.from_pretrained(artifact / "it", local_files_only=True)
            down, mid = net(noisy, times, text, batch["conditions"]["control"], return_dict=False, **conditions)
            if (artifact / "it" / "unet").is_dir():  # a UNet that was trained with the ControlNet
                models["denoiser"] = pipe.unet = UNet2DConditionModel.from_pretrained(artifact / "it" / "unet")
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        output = pipe.unet(noisy, times, encoder_hidden_states=text, **conditions, **residuals).sample
        velocity = pipe.scheduler.config.prediction_type == "v_prediction"
        target = (
            DDPMScheduler.from_config(pipe.scheduler.config).get_velocity(clean, noise, times) if velocity else noise
        )
        self.losses = (output - target).square().mean((1, 2, 3))
        count = batch.get("subject_count", len(self.losses))
        terms = [rows.mean() for rows in (self.losses[:count], self.losses[count:]) if len(rows)]
        sum(terms).backward()
        self.gradients = {f"{k}.{n}": p.grad for k, m in models.items() for n, p in m.named_parameters()}
        self.embedding_gradients = {
            k: m.get_input_embeddings().weight.grad for k, m in models.items() if k.startswith("text")
        }

    def _load_new_token(self, pipe: Any, artifact: Path) -> None:
        """Load the new token as in the documentation of diffusers."""
        if not hasattr(pipe, "text_encoder_2"):
            pipe.load_textual_inversion(str(artifact), weight_name="learned_embeds.safetensors")
            return
        vectors = load_file(artifact / "learned_embeds.safetensors")
        for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}"), getattr(pipe, f"tokenizer{suffix}")
            pipe.load_textual_inversion(vectors[key], token=WORD.token, text_encoder=encoder, tokenizer=tokenizer)

    def _conditions(self, pipe: Any, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Text embeddings, and for SDXL the additional conditions of its UNet.

        The pooled embedding is taken at the end token here: transformers takes it at the largest id, which is that of
        the new token.
        """
        settings = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        ids = pipe.tokenizer(batch["prompts"], **settings).input_ids
        if not hasattr(pipe, "text_encoder_2"):
            return pipe.text_encoder(ids)[0], {}
        ids_2 = pipe.tokenizer_2(batch["prompts"], **settings).input_ids
        output = pipe.text_encoder(ids, output_hidden_states=True)
        output_2 = pipe.text_encoder_2(ids_2, output_hidden_states=True)
        ends = [row.tolist().index(pipe.tokenizer_2.eos_token_id) for row in ids_2]
        pooled = torch.stack([states[end] for states, end in zip(output_2.last_hidden_state, ends, strict=True)])
        # Training images have 160x144 pixels, are scaled to cover 64x64 and cropped at the center.
        image_ids = torch.tensor([[144.0, 160.0, 0.0, 4.0, 64.0, 64.0]] * batch.get("subject_count", len(ids)))
        class_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * (len(ids) - len(image_ids)))
        conditions = {
            "text_embeds": pipe.text_encoder_2.text_projection(pooled),
            "time_ids": torch.cat([image_ids, class_ids.view(-1, 6)]),
        }
        return torch.cat([output.hidden_states[-2], output_2.hidden_states[-2]], -1), {"added_cond_kwargs": conditions}

    def gradient(self, name: str, parameters: dict[str, Tensor]) -> Tensor | None:
        """Gradient of the method's parameter ``name``; None if diffusers has no such parameter."""
        key = name.removeprefix("backbone.")
        if key.endswith(".lora_A.default.weight"):  # W + B A has a scale of 1
            weight_gradient = self.gradients[key.replace(".lora_A.default", "")]
            up = parameters[name.replace("lora_A", "lora_B")]
            return product(up.flatten(1).T, weight_gradient).view(parameters[name].shape)
        if key.endswith(".lora_B.default.weight"):
            weight_gradient = self.gradients[key.replace(".lora_B.default", "")]
            down = parameters[name.replace("lora_B", "lora_A")]
            return product(weight_gradient, down.flatten(1).T).view(parameters[name].shape)
        if key.endswith("token_embedding.vectors"):
            return self.embedding_gradients[key.partition(".")[0]][-1:]
        return self.gradients.get(key)


@every_unet
def test_loss_and_gradients_equal_plain_diffusers(case: Case, folder: Path, images: Path) -> None:
    """Compares the loss of every sample, class images included, and the gradient of every trained tensor.

    The VAE has a separate loss, which is tested in test_full.py.
    """
    recorded, spy = RecordLosses(), Spy()
    model = case.model(folder, lr=0.0)
    model.configure_model()
    add_noise_to_trainable(model)
    fit(model, case.data(folder, images), 1, [recorded, spy])
    reference = DiffusersStep(case, model, recorded.batch, folder, images.parent / "artifact")
    assert reference.losses.shape == (len(recorded.batch["prompts"]),)
    torch.testing.assert_close(recorded.losses, reference.losses.detach(), rtol=1e-5, atol=1e-6)
    parameters = {name: p.detach() for name, p in model.trainable() if not name.startswith("backbone.vae.")}
    expected = {name: reference.gradient(name, parameters) for name in parameters}
    assert None not in expected.values()
    assert all(gradient.any() for gradient in expected.values())
    gradients = {name: spy.gradients[0][name] for name in parameters}
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


@every_method
def test_caches_do_not_change_the_losses(case: Case, tiny: Path, images: Path) -> None:
    losses = []
    for cached in (True, False):
        spy = Spy()
        data = case.data(tiny, images, flip=True, caption_dropout=0.3, cache_latents=cached, cache_text=cached)
        fit(case.model(tiny), data, 3, [spy])
        losses.append(spy.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 3


# --- artifacts and resumed runs


@every_family
def test_loaded_artifact_generates_the_same_image_as_the_trained_model(
    case: Case, folder: Path, images: Path, tmp_path: Path
) -> None:
    model, data = case.model(folder, lr=1e-2), case.data(folder, images)
    trainer = fit(model, data, 2)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {name for name, _ in model.trainable()}

    model.artifact(tmp_path / "artifact", "mine")
    size = (model.backbone.facts.side,) * 2
    conditions = {"control": data.control.map(data.train[0], size)} if data.control is not None else {}
    requests = [Request("a fox <new>", 3, conditions)]
    settings = Sampling(steps=2, guidance=3.0)
    model.eval()

    [live_image] = generate(model.backbone, requests, settings, model)
    with RunModels(Pretrained(str(folder)), tmp_path / "artifact", "mine", torch.device("cpu")).trained() as loaded:
        [loaded_image] = generate(loaded, requests, settings)
    base = Pretrained(str(folder)).load()
    base.prepare_for_device(torch.device("cpu"))
    [base_image] = generate(base, [Request("a fox <new>", 3)], settings)
    assert np.abs(live_image.astype(int) - loaded_image).max() <= 1
    assert np.abs(live_image.astype(int) - base_image).max() > 1
    assert map_to_tensor(live_image).shape == (3, *size)


@pytest.mark.parametrize(
    ("case", "family"),
    [
        pytest.param(case, family, id=f"{case}-{family}" if family != "tiny" else str(case), marks=marks)
        for family, marks in (("tiny", ()), ("sd35_medium", pytest.mark.slow))
        for case in PLAIN
    ],
)
def test_resumed_run_equals_uninterrupted_run(
    case: Case, family: str, folder: Path, images: Path, tmp_path: Path
) -> None:
    """Bit for bit, with two loader workers, gradient accumulation and EMA; the run is stopped after step 2."""
    common = [a for a in arguments(folder, images, tmp_path) if not a.startswith(
        ("method", "hydra.run.dir", "callbacks.samples"))]  # fmt: skip
    if family == "sd35_medium":
        common = ["backbone=sd35_medium" if a == "backbone=sd15" else a for a in common]
    common += case.command(folder, images)
    common += ["name=mine", "data.batch_size=4", "trainer.accumulate_grad_batches=2", "data.workers=2"]
    common += ["callbacks=ema", "callbacks.samples=null", "checkpoint.every_steps=3", "optimizer.lr=1e-3"]
    common += ["trainer.max_steps=4", "lr_schedule=cosine", "lr_schedule.warmup_steps=1"]
    full_run, resumed_run = tmp_path / "full", tmp_path / "resumed"
    assert train(*common, f"hydra.run.dir={full_run}") == 0
    stop = ["trust=[running]", "+callbacks.stop={_target_: running.StopAt, step: 2}"]
    assert train(*common, *stop, f"hydra.run.dir={resumed_run}") == 128 + signal.SIGTERM
    assert int(rows(resumed_run)[-1]["step"]) == 2
    assert train(f"resume={resumed_run}") == 0
    assert rows(full_run) == rows(resumed_run)
    files = {p.relative_to(full_run / "artifact") for p in (full_run / "artifact").rglob("*.safetensors")}
    assert files
    for file in files:
        expected, resumed = load_file(full_run / "artifact" / file), load_file(resumed_run / "artifact" / file)
        assert all(torch.equal(value, resumed[key]) for key, value in expected.items()), file


# --- several processes

_SCRIPT = Path(__file__).parents[1] / "two_processes.py"


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_process(tiny: Path, images: Path, tmp_path: Path) -> None:
    """All methods in one call of torchrun, with the same global batch as in one process."""
    out = tmp_path / "losses.json"
    cases = {str(case): case for case in [*PLAIN, MORE[0]]}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", str(_SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_SCRIPT.parent)}
    result = subprocess.run(
        [*command, str(tiny), str(images), str(out), *cases], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    losses = json.loads(out.read_text(encoding="utf-8"))
    assert sorted(losses) == sorted(cases)
    for name, case in cases.items():
        spy = Spy()
        fit(case.model(tiny, lr=1e-3), case.data(tiny, images, batch_size=4), 4, [spy])
        assert losses[name] == pytest.approx(spy.losses, rel=1e-5), name


def test_final_weights_are_the_ema_and_are_restored_afterwards(tiny: Path, images: Path) -> None:
    case = PLAIN[0]
    model, ema = case.model(tiny, lr=1e-2), EMA(decay=0.5)
    fit(model, case.data(tiny, images), 2, [ema])
    weights = {name: p.detach().clone() for name, p in model.trainable()}
    with model.final_weights():
        assert all(torch.equal(p, ema.shadow[name]) for name, p in model.trainable())
    assert all(torch.equal(p, weights[name]) for name, p in model.trainable())
