"""What every method is held to, found by itself from ``conf/method``.

A sixth one is tested without a line here, unless its command needs more than a word, or its gradients more steps.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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

from families import FAMILIES, build_family
from method_cases import METHODS, MORE, WORD, Case
from running import Spy, arguments, fit, rows, train
from sdtune.backbone import Pretrained
from sdtune.callbacks import EMA
from sdtune.data.control.base import as_map
from sdtune.evaluation.draw import trained
from sdtune.sampling.loop import Request, Sampling, generate
from sdtune.training.random_draws import timesteps


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five images with edges in them, and captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        pixels = np.full((144, 160, 3), 30 * i, dtype=np.uint8)
        pixels[24 + 4 * i : 96, 32 : 80 + 12 * i] = (250, 40 * i, 90)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}")
    return folder


class Heir(Case):
    """A method of one's own that begins from one of sdtune's, and may train more."""

    @property
    def kind(self) -> Any:
        return type("Heir", (super().kind,), {"reads_denoiser_only": False})


PLAIN = [Case(name) for name in METHODS]


def _quick(case: Case, family: str) -> bool:
    """The rest has a command of its own, ``make test-slow``."""
    return family == "tiny" or (family == "sdxl" and case.kind.needs_tokens)


every = pytest.mark.parametrize(
    ("case", "family"),
    [
        pytest.param(case, family, id=f"{case}-{family}", marks=() if _quick(case, family) else pytest.mark.slow)
        for family in ("tiny", *FAMILIES)
        for case in [*PLAIN, *MORE]
    ],
)
each = pytest.mark.parametrize("case", PLAIN, ids=str)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda family: build_family(tmp_path_factory.mktemp(family), family))


@pytest.fixture
def folder(family: str, tiny: Path, build: Any) -> Path:
    """A backbone: the small one of most tests, or one with the true structure of its family."""
    return tiny if family == "tiny" else build(family)


def bits(model: Any, names: set[str]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if key not in names}


# --- what is trained


@every
def test_every_open_tensor_learns_and_no_frozen_bit_moves(case: Case, folder: Path, images: Path) -> None:
    steps = 3  # two zero convolutions in series have no gradient behind them before the third
    model, spy = case.model(folder), Spy()
    model.configure_model()
    opened = {name for name, _ in model.trainable()}
    before = bits(model, opened)
    fit(model, case.data(folder, images), steps, [spy])
    assert {name for name, _ in model.trainable()} == opened
    without = [name for name, gradient in spy.gradients[-1].items() if not gradient.any()]
    assert not without
    after = bits(model, opened)
    assert before.keys() == after.keys()
    moved = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert not moved


@every
def test_at_step_0_it_is_the_base(case: Case, folder: Path) -> None:
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
        mine = model.denoise(noisy, timesteps, model.backbone.encode_text(prompts), {"control": maps})
        wanted = base.predict(noisy, timesteps, base.encode_text(prompts))
    assert torch.equal(mine, wanted)


@each
def test_it_is_built_where_its_weights_were_read(case: Case, tiny: Path) -> None:
    """Not on the default device, which Lightning makes the run's while it builds: it may have no room for float32."""
    model = case.model(tiny)
    with torch.device("meta"):
        model.configure_model()
    tables = model.backbone.schedule.alphas_cumprod
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers(), tables]} == {"cpu"}


@each
def test_frozen_weights_go_to_the_device_in_half_precision(case: Case, tiny: Path, images: Path) -> None:
    seen: dict[str, torch.dtype] = {}

    class Watched(SingleDeviceStrategy):
        def model_to_device(self) -> None:
            seen.update({name: p.dtype for name, p in self.model.named_parameters() if not p.requires_grad})
            super().model_to_device()

    fit(case.model(tiny), case.data(tiny, images), 1, strategy=Watched("cpu"), precision="bf16-mixed")
    assert any(name.startswith("backbone.text_encoder.") for name in seen)
    float32 = {name for name, dtype in seen.items() if dtype != torch.bfloat16}
    assert float32 == {name for name in seen if name.startswith("backbone.vae.")}


@each
def test_a_unet_that_is_only_read_comes_in_half_precision(
    case: Case, tiny: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is to the bit the one that was read in float32 and halved then."""
    asked, load = [], Pretrained.load

    def spied(self: Pretrained, seed: int = 0, unet: torch.dtype | None = None) -> Any:
        asked.append(unet)
        return load(self, seed, unet)

    def learned() -> dict[str, Tensor]:
        model = case.model(tiny)
        fit(model, case.data(tiny, images), 3, precision="bf16-mixed")
        return dict(model.trainable())

    monkeypatch.setattr(Pretrained, "load", spied)
    here = learned()
    assert asked[0] == (torch.bfloat16 if case.kind.reads_denoiser_only else None)
    if case.kind.reads_denoiser_only:
        case = Heir(case.name, case.settings)
    asked.clear()
    there = learned()
    assert asked[0] is None
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, there[name]) for name, tensor in here.items())


# --- what the loss is


class Losses(Callback):
    """The batches, and each row's loss."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = {**batch}
        with torch.no_grad():
            self.losses = pl_module.losses(self.batch)  # which keeps in it what it encoded


def product(one: Tensor, other: Tensor) -> Tensor:
    """Of matrices, and of convolutions as the matrices that they are over a kernel's numbers."""
    return one.flatten(1) @ other.flatten(1)


def merge(model: Any, pipe: Any) -> None:
    """Add each pair's B A to its weight in ``pipe``."""
    opened = {name.removeprefix("backbone."): p.detach() for name, p in model.trainable()}
    for name in (name for name in opened if name.endswith(".lora_A.default.weight")):
        component, path = name.removesuffix(".lora_A.default.weight").split(".", 1)
        weight = getattr(pipe, component).get_submodule(path).weight
        weight.data += product(opened[name.replace("lora_A", "lora_B")], opened[name]).view(weight.shape)


def shake(model: Any) -> None:
    """Move every open tensor, so that what begins at zero acts."""
    rng = torch.Generator().manual_seed(0)
    for _, parameter in model.trainable():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)


class Plain:
    """The same step by diffusers' own modules, loaded from the backbone's folder and from what the method leaves."""

    def __init__(self, case: Case, model: Any, batch: Any, folder: Path, artifact: Path) -> None:
        model.artifact(artifact, "it")
        whole = artifact / "it" if (artifact / "it" / "model_index.json").is_file() else folder
        pipe: Any = DiffusionPipeline.from_pretrained(whole, local_files_only=True)
        merge(model, pipe)
        if case.kind.needs_tokens:
            self._learn(pipe, artifact)
        text, conditions = self._conditions(pipe, batch)
        mean, log_variance = batch["moments"].chunk(2, dim=1)
        shape = (4, *mean.shape[2:])
        drawn = model.noise(shape, "train/vae", 0, batch["positions"])
        clean = (mean + (0.5 * log_variance).exp() * drawn) * pipe.vae.config.scaling_factor
        noise = model.noise(shape, "train/noise", 0, batch["positions"])
        times = timesteps(1000, 0, "train", 0, batch["positions"], torch.device("cpu"))
        noisy = pipe.scheduler.add_noise(clean, noise, times)
        parts, more = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}, {}
        if hasattr(pipe, "text_encoder_2"):
            parts["text_encoder_2"] = pipe.text_encoder_2
        if (artifact / "it" / "config.json").is_file():
            parts["controlnet"] = net = ControlNetModel.from_pretrained(artifact / "it", local_files_only=True)
            down, mid = net(noisy, times, text, batch["control"], return_dict=False, **conditions)
            if (artifact / "it" / "unet").is_dir():  # it was trained along
                parts["unet"] = pipe.unet = UNet2DConditionModel.from_pretrained(artifact / "it" / "unet")
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        output = pipe.unet(noisy, times, encoder_hidden_states=text, **conditions, **more).sample
        velocity = pipe.scheduler.config.prediction_type == "v_prediction"
        target = (
            DDPMScheduler.from_config(pipe.scheduler.config).get_velocity(clean, noise, times) if velocity else noise
        )
        self.losses = (output - target).square().mean((1, 2, 3))
        count = batch.get("instances", len(self.losses))
        terms = [rows.mean() for rows in (self.losses[:count], self.losses[count:]) if len(rows)]
        sum(terms).backward()
        self.gradients = {f"{k}.{n}": p.grad for k, part in parts.items() for n, p in part.named_parameters()}
        self.word = {k: v.get_input_embeddings().weight.grad for k, v in parts.items() if k.startswith("text")}

    def _learn(self, pipe: Any, artifact: Path) -> None:
        """The word, as diffusers' documentation has it loaded."""
        if not hasattr(pipe, "text_encoder_2"):
            pipe.load_textual_inversion(str(artifact), weight_name="learned_embeds.safetensors")
            return
        vectors = load_file(artifact / "learned_embeds.safetensors")
        for key, place in (("clip_l", ""), ("clip_g", "_2")):
            encoder, words = getattr(pipe, f"text_encoder{place}"), getattr(pipe, f"tokenizer{place}")
            pipe.load_textual_inversion(vectors[key], token=WORD.token, text_encoder=encoder, tokenizer=words)

    def _conditions(self, pipe: Any, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Of SDXL also what its UNet takes beside the states; the pooled state at the end token, by hand.

        transformers would take it at the largest id, which a new word has.
        """
        settings = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        ids = pipe.tokenizer(batch["prompts"], **settings).input_ids
        if not hasattr(pipe, "text_encoder_2"):
            return pipe.text_encoder(ids)[0], {}
        second = pipe.tokenizer_2(batch["prompts"], **settings).input_ids
        one = pipe.text_encoder(ids, output_hidden_states=True)
        two = pipe.text_encoder_2(second, output_hidden_states=True)
        ends = [row.tolist().index(pipe.tokenizer_2.eos_token_id) for row in second]
        last = torch.stack([states[end] for states, end in zip(two.last_hidden_state, ends, strict=True)])
        # An image of 160x144, scaled to cover 64x64 and cropped at the centre.
        wide = torch.tensor([[144.0, 160.0, 0.0, 4.0, 64.0, 64.0]] * batch.get("instances", len(ids)))
        drawn = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * (len(ids) - len(wide)))
        conditions = {
            "text_embeds": pipe.text_encoder_2.text_projection(last),
            "time_ids": torch.cat([wide, drawn.view(-1, 6)]),
        }
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), {"added_cond_kwargs": conditions}

    def gradient(self, name: str, parameters: dict[str, Tensor]) -> Tensor | None:
        """Of what the method calls ``name``; None where diffusers has nothing of that name."""
        own = name.removeprefix("backbone.")
        if own.endswith(".lora_A.default.weight"):  # of W + B A at a scale of 1
            outer = self.gradients[own.replace(".lora_A.default", "")]
            up = parameters[name.replace("lora_A", "lora_B")]
            return product(up.flatten(1).T, outer).view(parameters[name].shape)
        if own.endswith(".lora_B.default.weight"):
            outer = self.gradients[own.replace(".lora_B.default", "")]
            down = parameters[name.replace("lora_B", "lora_A")]
            return product(outer, down.flatten(1).T).view(parameters[name].shape)
        if own.endswith("token_embedding.vectors"):
            return self.word[own.partition(".")[0]][-1:]
        return self.gradients.get(own)


@every
def test_loss_and_gradients_are_those_of_plain_diffusers(case: Case, folder: Path, images: Path) -> None:
    """Every row's loss, those of the class too, and the gradient of every tensor that is trained.

    The VAE's are of another loss, and tested with full fine-tuning.
    """
    seen, spy = Losses(), Spy()
    model = case.model(folder, lr=0.0)
    model.configure_model()
    shake(model)
    fit(model, case.data(folder, images), 1, [seen, spy])
    plain = Plain(case, model, seen.batch, folder, images.parent / "artifact")
    assert plain.losses.shape == (len(seen.batch["prompts"]),)
    torch.testing.assert_close(seen.losses, plain.losses.detach(), rtol=1e-5, atol=1e-6)
    parameters = {name: p.detach() for name, p in model.trainable() if not name.startswith("backbone.vae.")}
    wanted = {name: plain.gradient(name, parameters) for name in parameters}
    assert None not in wanted.values()
    assert all(gradient.any() for gradient in wanted.values())
    found = {name: spy.gradients[0][name] for name in parameters}
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@each
def test_caches_change_nothing(case: Case, tiny: Path, images: Path) -> None:
    losses = []
    for cached in (True, False):
        spy = Spy()
        data = case.data(tiny, images, flip=True, caption_dropout=0.3, cache_latents=cached, cache_text=cached)
        fit(case.model(tiny), data, 3, [spy])
        losses.append(spy.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 3


# --- what is kept


@every
def test_saved_and_loaded_it_draws_the_same(case: Case, folder: Path, images: Path, tmp_path: Path) -> None:
    model, data = case.model(folder, lr=1e-2), case.data(folder, images)
    trainer = fit(model, data, 2)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert set(kept["state_dict"]) == {name for name, _ in model.trainable()}

    model.artifact(tmp_path / "artifact", "mine")
    size = (model.backbone.facts.side,) * 2
    maps = (data.control.map(data.train[0], size),) if data.control is not None else ()
    requests = [Request("a fox <new>", 3, maps)]
    settings = Sampling(steps=2, guidance=3.0)
    model.eval()

    def denoise(noisy: Tensor, timestep: Tensor, text: Tensor, shown: Any) -> Tensor:
        return model.denoise(noisy, timestep, text, {"control": shown[0]} if shown else {})

    [mine] = generate(model.backbone, requests, settings, denoise)
    with trained(Pretrained(str(folder)), tmp_path / "artifact", "mine", torch.device("cpu")) as loaded:
        [theirs] = generate(loaded, requests, settings)
    base = Pretrained(str(folder)).load()
    base.prepare_for_device(torch.device("cpu"))
    [before] = generate(base, [Request("a fox <new>", 3)], settings)
    assert np.abs(mine.astype(int) - theirs).max() <= 1
    assert np.abs(mine.astype(int) - before).max() > 1
    assert as_map(mine).shape == (3, *size)


@each
def test_stopped_and_resumed_is_never_stopped(case: Case, tiny: Path, images: Path, tmp_path: Path) -> None:
    """Bit for bit, with two loader workers, accumulation and an average of the weights; asked to stop after step 2."""
    common = [a for a in arguments(tiny, images, tmp_path) if not a.startswith(
        ("method", "hydra.run.dir", "callbacks.samples"))]  # fmt: skip
    common += case.command(tiny, images)
    common += ["name=mine", "data.batch_size=4", "trainer.accumulate_grad_batches=2", "data.workers=2"]
    common += ["callbacks=ema", "callbacks.samples=null", "checkpoint.every_steps=3", "optimizer.lr=1e-3"]
    common += ["trainer.max_steps=4", "lr_schedule=cosine", "lr_schedule.warmup_steps=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*common, f"hydra.run.dir={whole}") == 0
    stop = ["trust=[running]", "+callbacks.stop={_target_: running.StopAt, step: 2}"]
    assert train(*common, *stop, f"hydra.run.dir={parts}") == 128 + signal.SIGTERM
    assert int(rows(parts)[-1]["step"]) == 2
    assert train(f"resume={parts}") == 0
    assert rows(whole) == rows(parts)
    files = {p.relative_to(whole / "artifact") for p in (whole / "artifact").rglob("*.safetensors")}
    assert files
    for file in files:
        one, other = load_file(whole / "artifact" / file), load_file(parts / "artifact" / file)
        assert all(torch.equal(value, other[key]) for key, value in one.items()), file


# --- several processes

_SCRIPT = Path(__file__).parents[1] / "two_processes.py"


@pytest.mark.slow
def test_two_processes_are_one(tiny: Path, images: Path, tmp_path: Path) -> None:
    """Under torchrun, all methods in one start; the same global batch in one process gives the same losses."""
    out = tmp_path / "losses.json"
    cases = {str(case): case for case in [*PLAIN, MORE[0]]}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", str(_SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_SCRIPT.parent)}
    done = subprocess.run(
        [*command, str(tiny), str(images), str(out), *cases], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert sorted(found) == sorted(cases)
    for name, case in cases.items():
        spy = Spy()
        fit(case.model(tiny, lr=1e-3), case.data(tiny, images, batch_size=4), 4, [spy])
        assert found[name] == pytest.approx(spy.losses, rel=1e-5), name


def test_an_average_stands_in_when_a_run_leaves_its_files(tiny: Path, images: Path) -> None:
    case = PLAIN[0]
    model, ema = case.model(tiny, lr=1e-2), EMA(decay=0.5)
    fit(model, case.data(tiny, images), 2, [ema])
    own = {name: p.detach().clone() for name, p in model.trainable()}
    with model.final_weights():
        assert all(torch.equal(p, ema.shadow[name]) for name, p in model.trainable())
    assert all(torch.equal(p, own[name]) for name, p in model.trainable())
