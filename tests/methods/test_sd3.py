"""The five methods on SD 3: a training step equals plain diffusers, counts of parameters, refusals, artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from families import SD3
from image_data import noise
from running import Spy, adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.meta import MetaPretrained
from sdtune.backbone.new_tokens import NewToken
from sdtune.backbone.single_file import CONFIGS
from sdtune.data.control.edges import Canny, Scribble
from sdtune.data.views import map_key
from sdtune.errors import UserError
from sdtune.loaders.artifact import artifacts_applied
from sdtune.loaders.controlnet import load_applicable_controlnet
from sdtune.loaders.lora import AdapterFile, load_adapters
from sdtune.methods import ControlNet, DreamBooth, Full, LoRA, TextualInversion
from sdtune.objective import Objective, Timesteps
from sdtune.randomness import generator
from sdtune.sampling import Request, Sampling, generate
from sdtune.sampling.prompts import count_tokens, warn_about_truncated_prompts

T5_TOKENS = 12
POSITIONS, STEP, SEED = [4, 5], 7, 11
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
WORD = NewToken("<new>", "a word", 2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Captioned images that are at least as large as the smallest bucket."""
    for number in range(3):
        noise(tmp_path / "images" / f"{number}.png", 96, 80, number, f"image number {number}")
    return tmp_path / "images"


def source(folder: Path, **settings: Any) -> Pretrained:
    return Pretrained(str(folder), t5_tokens=T5_TOKENS, **settings)


def drawn_times(kind: str) -> Tensor:
    """Times of the samples, by the formulas of Esser et al. 2024, with the model's shift of 3."""
    times = []
    for position in POSITIONS:
        rng = generator(SEED, "train/timestep", STEP, position)
        u = 1 - rng.random() if kind == "uniform" else 1 / (1 + np.exp(-rng.standard_normal()))
        times.append(3 * u / (1 + 2 * u))
    return torch.tensor(times, dtype=torch.float64)


def stream_noise(stream: str) -> Tensor:
    rows = [generator(SEED, stream, STEP, p).standard_normal((4, 8, 8), dtype="float32") for p in POSITIONS]
    return torch.stack([torch.from_numpy(row) for row in rows]).double()


def add_noise_to_trainable(model: Any) -> None:
    """So that modules that start at zero have an effect."""
    rng = torch.Generator().manual_seed(0)
    for _, parameter in model.trainable():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "full": (Full, {"parts": ["denoiser", "text_encoder"]}),
    "dreambooth": (DreamBooth, {}),
    "lora": (LoRA, {"targets": ["joint_attention", "self_attention", "feed_forward"], "rank": 3}),
    "textual_inversion": (TextualInversion, {"new_tokens": [WORD]}),
    "textual_inversion of T5": (TextualInversion, {"new_tokens": [WORD], "encoders": list(ENCODERS)}),
    "controlnet": (ControlNet, {}),
}


def float64_model(case: str, folder: Path, kind: Any) -> Any:
    method, settings = CASES[case]
    objective = Objective(timesteps=Timesteps(kind))
    model = method(backbone=source(folder), optimizer=adamw(1e-3), seed=SEED, objective=objective, **settings)
    model.configure_model()
    model.double()
    for encoder in model.backbone.encoders.values():
        encoder.double()
    add_noise_to_trainable(model)
    return model


class DiffusersStep:
    """The same step with plain diffusers modules."""

    def __init__(self, folder: Path, model: Any, batch: dict[str, Any], t: Tensor) -> None:
        pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
        self.models = {"denoiser": pipe.transformer, **{name: getattr(pipe, name) for name in ENCODERS}}
        for name, own in self.models.items():
            own.double().requires_grad_(True)
            trained = model.backbone.denoiser if name == "denoiser" else model.backbone.encoders[name]
            own.load_state_dict(merged(trained), strict=False)
        self.rows = self._add_words(pipe, model)
        states, pooled = self._text(pipe, batch["prompts"])
        mean, log_variance = batch["moments"].chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * log_variance) * stream_noise("train/vae")
        clean, noise = (latents - 0.0609) * 1.5305, stream_noise("train/noise")
        sigma = t[:, None, None, None]
        noisy = (1 - sigma) * clean + sigma * noise
        arguments = {
            "hidden_states": noisy,
            "timestep": (1000 * t).float(),
            "encoder_hidden_states": states,
            "pooled_projections": pooled,
        }
        added = {}
        if "control" in batch["conditions"]:
            self.models["controlnet"] = net = self._controlnet(model)
            maps = pipe.vae.double().encode(2 * batch["conditions"]["control"].double() - 1).latent_dist.mean.detach()
            residuals = net(controlnet_cond=(maps - 0.0609) * 1.5305, return_dict=False, **arguments)[0]
            added = {"block_controlnet_hidden_states": residuals}
        output = pipe.transformer(**arguments, **added).sample
        self.losses = (output - (noise - clean)).square().mean((1, 2, 3))
        self.losses.mean().backward()

    def _controlnet(self, model: Any) -> Any:
        net = SD3ControlNetModel.from_config(model.controlnet.config).double()
        net.load_state_dict(model.controlnet.state_dict())
        return net

    def _add_words(self, pipe: Any, model: Any) -> dict[str, slice]:
        """Append the vectors of the new word to the embedding tables; their rows by text encoder."""
        rows = {}
        for name, known in model.backbone.new_tokens.items():
            table = self.models[name].get_input_embeddings()
            vectors = model.backbone.encoders[name].get_input_embeddings().vectors.detach()
            larger = torch.nn.Embedding(len(table.weight) + len(vectors), table.weight.shape[1], dtype=torch.float64)
            larger.weight.data = torch.cat([table.weight.data, vectors])
            self.models[name].set_input_embeddings(larger)
            rows[name] = slice(known.first_id, known.first_id + len(vectors))
        return rows

    def _ids(self, name: str, tokenizer: Any, prompt: str, length: int) -> list[int]:
        """Ids of ``prompt`` with the ids of the word in the middle, as a user of diffusers would build them."""
        ids: list[int] = []
        parts = prompt.split(WORD.token) if name in self.rows else [prompt]
        for number, part in enumerate(parts):
            if number:
                ids += range(self.rows[name].start, self.rows[name].stop)
            ids += tokenizer(part, add_special_tokens=False).input_ids
        if name == "text_encoder_3":
            ids = [*ids[: length - 1], 1]
            return ids + [0] * (length - len(ids))
        ids = [tokenizer.bos_token_id, *ids[: length - 2], tokenizer.eos_token_id]
        return ids + [tokenizer.pad_token_id] * (length - len(ids))

    def _text(self, pipe: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
        states, pooled = [], []
        tokenizers = (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3)
        for name, tokenizer, length in zip(ENCODERS, tokenizers, (77, 77, T5_TOKENS), strict=True):
            ids = torch.tensor([self._ids(name, tokenizer, prompt, length) for prompt in prompts])
            encoder = self.models[name]
            if name == "text_encoder_3":
                t5 = encoder(ids)[0]
                continue
            out = encoder(ids, output_hidden_states=True)
            ends = (ids == tokenizer.eos_token_id).int().argmax(-1)
            states.append(out.hidden_states[-2])
            pooled.append(encoder.text_projection(out.last_hidden_state[torch.arange(len(ids)), ends]))
        clip = torch.cat(states, -1)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], 1), torch.cat(pooled, -1)


def merged(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights of ``model`` by their names in diffusers, with LoRA pairs merged."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if "lora_" not in name and not name.endswith(".vectors"):
            state[name.replace(".base_layer", "").replace(".table.weight", ".weight")] = value.clone()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            state[f"{name}.weight"] += (module.scaling["default"] * b @ a).detach()
    return state


def assert_gradients_equal(model: Any, step: DiffusersStep) -> None:
    expected = {f"{k}.{n}": p.grad for k, m in step.models.items() for n, p in m.named_parameters()}
    for name, parameter in model.trainable():
        key = name.removeprefix("backbone.")
        if key.endswith("vectors"):
            encoder = "text_encoder_3" if key == "waiting_vectors" else key.split(".")[0]
            table = step.models[encoder].get_input_embeddings()
            torch.testing.assert_close(parameter.grad, table.weight.grad[step.rows[encoder]], rtol=1e-8, atol=1e-10)
        elif "lora_" in key:
            layer, which = key.split(".lora_")
            module = model.backbone.denoiser.get_submodule(layer.removeprefix("denoiser."))
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            gradient = module.scaling["default"] * expected[f"{layer}.weight"]
            product = gradient @ a.T if which.startswith("B") else b.T @ gradient
            torch.testing.assert_close(parameter.grad, product, rtol=1e-8, atol=1e-10)
        else:
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_plain_diffusers(sd35_medium: Path, case: str, kind: str) -> None:
    model = float64_model(case, sd35_medium, kind)
    rng = torch.Generator().manual_seed(3)
    batch: dict[str, Any] = {
        "prompts": ["a <new> fox", "two <new>"],
        "step": STEP,
        "positions": POSITIONS,
        "moments": torch.randn(2, 8, 8, 8, generator=rng, dtype=torch.float64),
        "conditions": {},
    }
    if case == "controlnet":
        batch["conditions"] = {"control": torch.rand(2, 3, 64, 64, generator=rng)}  # encoded in the step
        # The latents of the map are computed in float32 otherwise.
        model.backbone.encode_images = lambda x: model.backbone.vae.encode(x.double()).latent_dist.parameters
    losses = model.losses(batch)
    losses.mean().backward()
    step = DiffusersStep(sd35_medium, model, batch, drawn_times(kind))
    torch.testing.assert_close(losses, step.losses, rtol=1e-8, atol=0)
    assert all(parameter.grad is not None and parameter.grad.any() for _, parameter in model.trainable())
    assert_gradients_equal(model, step)


# --- what is trained


@pytest.mark.parametrize(
    ("family", "count", "with_unused"),
    [
        ("sd3_medium", 9_338_880, 9_388_032),
        ("sd35_medium", 11_894_784, 11_943_936),
        ("sd35_large", 23_502_848, 23_580_672),
    ],
)
def test_parameter_count_of_a_lora_on_the_true_models(family: str, count: int, with_unused: int) -> None:
    model = LoRA(backbone=MetaPretrained(str(CONFIGS / family), t5=False), rank=16)
    with torch.device("meta"):
        model.configure_model()
    assert sum(p.numel() for _, p in model.trainable()) == count
    width = model.backbone.denoiser.config.num_attention_heads * 64
    assert count + 16 * 2 * width == with_unused
    frozen = model.backbone.frozen_prefixes("denoiser")
    assert not [name for name, _ in model.trainable() if name.removeprefix("backbone.denoiser.").startswith(frozen)]


@pytest.mark.parametrize("case", CASES)
def test_every_trainable_tensor_gets_a_gradient(sd35_medium: Path, images: Path, case: str) -> None:
    method, settings = CASES[case]
    model = method(backbone=source(sd35_medium), optimizer=adamw(1e-2), **settings)
    more: dict[str, Any] = {"control": Canny()} if method is ControlNet else {}
    more |= {"class_prompt": "a dog", "class_images": 2} if method is DreamBooth else {}
    more |= {"templates": ["<new> {}"]} if method is TextualInversion else {}
    before: dict[str, Tensor] = {}
    model.configure_model()
    before = {name: p.detach().clone() for name, p in model.trainable()}
    fit(model, folder_data(images, **more), 3)
    unchanged = [name for name, p in model.trainable() if torch.equal(p.cpu(), before[name])]
    assert unchanged == []


def test_last_block_of_a_controlnet_is_frozen_where_it_has_no_effect(sd35_medium: Path) -> None:
    model = ControlNet(backbone=source(sd35_medium))
    model.configure_model()
    frozen = {name for name, p in model.controlnet.named_parameters() if not p.requires_grad}
    assert frozen
    assert {name.split(".", 2)[2].rsplit(".", 1)[0] for name in frozen} == {
        "attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2",
    }  # fmt: skip


# --- what a step does not compute


class Forbid(Callback):
    """Makes modules unusable before the first step."""

    def __init__(self, modules: Callable[[Any], list[Any]]) -> None:
        self.modules = modules

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for module in self.modules(pl_module):
            module.forward = None
            module.encode = None


def test_control_maps_are_encoded_once(sd35_medium: Path, images: Path) -> None:
    held_out = shutil.copytree(images, images.with_name("held out"))
    losses = []
    for cached in (True, False):
        forbidden = [Forbid(lambda model: [model.backbone.vae])] if cached else []
        spy, model = Spy(), ControlNet(backbone=source(sd35_medium), optimizer=adamw(1e-2), seed=2)
        data = folder_data(
            images, control=Canny(), flip=True, cache_latents=cached, validation_path=str(held_out), batch_size=3
        )
        fit(model, data, 3, [spy, *forbidden], check_val_every_n_epoch=None, val_check_interval=2)
        losses.append([*spy.losses, *spy.validation])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 4


@pytest.mark.parametrize(
    "control", [Canny(), Scribble(), type("Own", (Canny,), {})()], ids=["canny", "scribble", "a user's class"]
)
def test_other_maps_of_the_same_images_have_other_latents(images: Path, control: Any) -> None:
    data = folder_data(images, control=control)
    data.open(64, 8)
    first, second = data.train[0], data.train[1]
    keys = {map_key(kind, sample, size, flip) for kind in (control, Canny(low=20)) for sample in (first, second)
            for size in ((64, 64), (64, 96)) for flip in (False, True)}  # fmt: skip
    assert len(keys) == 16


def test_t5_encodes_each_caption_once_while_clip_learns(sd35_medium: Path, images: Path) -> None:
    losses = []
    for cached in (True, False):
        forbidden = [Forbid(lambda model: [model.backbone.encoders["text_encoder_3"]])] if cached else []
        spy, settings = Spy(), {"new_tokens": [WORD], "optimizer": adamw(1e-2), "seed": 2}
        model = TextualInversion(backbone=source(sd35_medium), **settings)
        fit(model, folder_data(images, templates=["<new> {}"], cache_text=cached), 3, [spy, *forbidden])
        losses.append(spy.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_t5_that_learns_a_word_is_not_cached(sd35_medium: Path, images: Path) -> None:
    model = TextualInversion(backbone=source(sd35_medium), new_tokens=[WORD], encoders=ENCODERS, optimizer=adamw(1e-2))
    data = folder_data(images, templates=["<new> {}"])
    fit(model, data, 1)
    assert data.caches.waiting is None
    assert data.caches.text is None


def test_size_of_the_cache_of_captions_is_said_before(
    sd35_medium: Path, images: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdtune.data.datamodule._LARGE_CACHE", 1)
    caplog.set_level("INFO", logger="sdtune")
    fit(LoRA(backbone=source(sd35_medium)), folder_data(images), 1)
    said = [record.message for record in caplog.records if "text embeddings" in record.message]
    assert len(said) == 1
    assert said[0].startswith("the text embeddings of 3 captions take 0.0 GB in ")


def test_training_a_turbo_model_warns(
    sd35_medium: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turbo = shutil.copytree(sd35_medium, tmp_path / "sd35-large-turbo")
    fit(LoRA(backbone=source(turbo)), folder_data(images), 1)
    assert [r.message for r in caplog.records if "seems to be a Turbo model; training undoes" in r.message]
    caplog.clear()
    fit(LoRA(backbone=source(sd35_medium)), folder_data(images), 1)
    assert "Turbo" not in caplog.text


@pytest.mark.parametrize("chosen", [["text_encoder"], ["text_encoder_2"], ["text_encoder_3"], list(ENCODERS)])
@pytest.mark.parametrize("t5", [True, False])
def test_word_of_some_encoders_loads(sd35_medium: Path, tmp_path: Path, chosen: list[Any], t5: bool) -> None:
    model = TextualInversion(backbone=source(sd35_medium), new_tokens=[WORD], encoders=chosen)
    model.configure_model()
    add_noise_to_trainable(model)
    model.artifact(tmp_path, "it")
    target = source(sd35_medium, t5=t5)
    backbone = target.load()
    if "text_encoder_3" in chosen and not t5:
        with pytest.raises(UserError, match="embedding size"):
            load_adapters(backbone, [AdapterFile(str(tmp_path))], target)
        return
    with artifacts_applied(backbone, load_adapters(backbone, [AdapterFile(str(tmp_path))], target)):
        assert set(backbone.new_tokens) == set(chosen)
        if t5:
            expected = model.backbone.encode_text(["a <new> fox"])
            torch.testing.assert_close(backbone.encode_text(["a <new> fox"]).states, expected.states)


def test_prompt_is_cut_where_t5_stops(sd35_medium: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = source(sd35_medium).load()
    assert count_tokens(backbone, ["a b"]) == [len(backbone.token_ids(["a b"], "text_encoder_3")[0]) + 1]
    warn_about_truncated_prompts(backbone, ["a b", "a b c d e f g h i j k l m n o p"])
    assert len(caplog.records) == 1
    assert "the limit is 12" in caplog.text
    caplog.clear()
    warn_about_truncated_prompts(source(sd35_medium, t5=False).load(), ["a b c d e f g h i j k l m n o p"])
    assert caplog.records == []


# --- refusals


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        (
            "sd3_medium",
            ["self_attention"],
            r"^method\.targets: SD 3 medium has no self_attention; set some of joint",
        ),
        ("sd35_medium", ["cross_attention"], r"^method\.targets: SD 3\.5 medium has no cross_attention"),
        ("sd35_large", ["convolutions"], r"^method\.targets: SD 3\.5 large has no convolutions"),
    ],
)
def test_target_that_the_model_lacks_is_refused(
    sd3_folders: dict[SD3, Path], images: Path, family: SD3, targets: list[Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        LoRA(backbone=source(sd3_folders[family]), targets=targets).check_data(folder_data(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoiser": "decoder"}, r"^method\.denoiser: SD 3\.5 medium has no decoder; set frozen or all"),
        ({"layers": 2}, r"^method\.layers: got 2, but the transformer has 3 blocks, .*; set at most 1"),
    ],
)
def test_settings_of_a_controlnet_that_do_not_fit_are_refused(
    sd35_medium: Path, images: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ControlNet(backbone=source(sd35_medium), **settings).check_data(folder_data(images, control=Canny()))


def test_encoder_that_the_model_lacks_cannot_learn_a_word(sd35_medium: Path, tiny: Path, images: Path) -> None:
    for backbone in (source(sd35_medium, t5=False), Pretrained(str(tiny))):
        model = TextualInversion(backbone=backbone, new_tokens=[WORD], encoders=["text_encoder_3"])
        with pytest.raises(UserError, match=r"^method\.encoders: this model has no text_encoder_3; set some of"):
            model.check_data(folder_data(images))


# --- artifacts in diffusers


def images_of(pipe: Any, **more: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        "a dog", negative_prompt="", num_inference_steps=6, guidance_scale=3.0, output_type="np", height=64, width=64,
        generator=torch.Generator().manual_seed(4), max_sequence_length=T5_TOKENS, **more,
    )  # fmt: skip
    return out.images[0]


def test_controlnet_generates_the_same_image_as_its_diffusers_pipeline(
    sd35_medium: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdtune.backbone.loading.T5_DTYPE", torch.float32)
    model = ControlNet(backbone=source(sd35_medium))
    model.configure_model()
    add_noise_to_trainable(model)
    model.artifact(tmp_path, "net")
    control_map = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    net = SD3ControlNetModel.from_pretrained(tmp_path / "net", local_files_only=True)
    pipe = StableDiffusion3ControlNetPipeline.from_pretrained(sd35_medium, controlnet=net, local_files_only=True)
    encode = pipe.vae.encode

    def mean_of(pixels: Tensor) -> Any:
        out = encode(pixels)
        out.latent_dist.sample = out.latent_dist.mode
        return out

    pipe.vae.encode = mean_of
    expected = images_of(pipe, control_image=Image.fromarray(control_map), controlnet_conditioning_scale=0.8)
    backbone = source(sd35_medium).load()
    loaded = load_applicable_controlnet(backbone, source(sd35_medium), str(tmp_path / "net"), 0.8)
    settings = Sampling(steps=6, guidance=3.0)
    with artifacts_applied(backbone, [loaded]):
        [image] = generate(backbone, [Request("a dog", 4, {"control": control_map})], settings)
    [base] = generate(backbone, [Request("a dog", 4)], settings)
    assert np.abs(image - (expected * 255).round()).max() <= 1
    assert np.abs(image.astype(int) - base).max() > 3


def test_lora_generates_the_same_image_in_diffusers(
    sd35_medium: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdtune.backbone.loading.T5_DTYPE", torch.float32)
    targets: list[Any] = ["joint_attention", "self_attention", "feed_forward", "text_encoder"]
    model = LoRA(backbone=source(sd35_medium), targets=targets, optimizer=adamw(1e-2))
    fit(model, folder_data(images), 2)
    model.artifact(tmp_path, "it")
    pipe = StableDiffusion3Pipeline.from_pretrained(sd35_medium, local_files_only=True)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    expected = images_of(pipe)
    model.eval()
    model.to("cpu")
    [live] = generate(model.backbone, [Request("a dog", 4)], Sampling(steps=6, guidance=3.0), model)
    assert np.abs(live - (expected * 255).round()).max() <= 1


def test_full_model_loads_in_diffusers(sd35_medium: Path, images: Path, tmp_path: Path) -> None:
    model = Full(backbone=source(sd35_medium), optimizer=adamw(1e-2))
    fit(model, folder_data(images), 2)
    model.artifact(tmp_path, "it")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "it" / "transformer", local_files_only=True)
    trained = model.backbone.denoiser.state_dict()
    assert all(torch.equal(value, trained[name].cpu()) for name, value in loaded.state_dict().items())
    assert StableDiffusion3Pipeline.from_pretrained(tmp_path / "it", local_files_only=True) is not None
