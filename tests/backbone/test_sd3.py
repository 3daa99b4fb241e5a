"""SD 3: sampling and text embeddings equal those of diffusers, with and without T5; single files; refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor

from families import SD3, SD3_FAMILIES
from image_data import noise
from running import fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.backbone.families import SD35_MEDIUM
from sdtune.backbone.families.sd3_backbone import SD3Backbone
from sdtune.backbone.new_tokens import NewToken
from sdtune.backbone.quantization import Quantized
from sdtune.errors import UserError
from sdtune.exporting.models import write_single_file
from sdtune.methods import Full, LoRA, TextualInversion
from sdtune.sampling import Request, Sampling, generate
from sdtune.sampling.load import load_to_generate

T5_TOKENS = 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))


def source(path: Path, **settings: Any) -> Pretrained:
    return Pretrained(str(path), t5_tokens=T5_TOKENS, **settings)


@pytest.fixture
def float32_t5(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 in float32: in bfloat16 the last bit, 0.4%, depends on how a sum is ordered."""
    monkeypatch.setattr("sdtune.backbone.loading.T5_DTYPE", torch.float32)


def pipeline(folder: Path, t5: bool = True) -> Any:
    missing = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **missing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, **settings: Any) -> np.ndarray:
    out = pipe(
        "a dog", negative_prompt="", generator=torch.Generator().manual_seed(4), output_type="np",
        max_sequence_length=T5_TOKENS, height=64, width=64, **settings,
    )  # fmt: skip
    return out.images[0]


# --- equality with diffusers


@pytest.mark.usefixtures("float32_t5")
@pytest.mark.parametrize("t5", [True, False])
@pytest.mark.parametrize("family", SD3_FAMILIES)
def test_images_equal_those_of_the_diffusers_pipeline(sd3_folders: dict[SD3, Path], family: SD3, t5: bool) -> None:
    expected = images(pipeline(sd3_folders[family], t5), num_inference_steps=28, guidance_scale=4.5)
    backbone = source(sd3_folders[family], family=family, t5=t5).load()
    [image] = generate(backbone, [Request("a dog", 4)], Sampling(steps=28, guidance=4.5))
    assert np.abs(image - (expected * 255).round()).max() <= 1
    assert image.std() > 10


@pytest.mark.usefixtures("float32_t5")
def test_skip_layer_guidance_equals_that_of_the_diffusers_pipeline(sd35_medium: Path) -> None:
    settings: dict[str, Any] = {"skip_guidance_layers": [0, 1], "skip_layer_guidance_scale": 2.5}
    expected = images(pipeline(sd35_medium, True), num_inference_steps=28, guidance_scale=4.5, **settings)
    backbone = source(sd35_medium).load()
    [image] = generate(backbone, [Request("a dog", 4)], Sampling(steps=28, guidance=4.5, **settings))
    [without] = generate(backbone, [Request("a dog", 4)], Sampling(steps=28, guidance=4.5))
    assert np.abs(image - (expected * 255).round()).max() <= 1
    assert np.abs(image.astype(int) - without).max() > 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"skip_guidance_layers": [3]},
            r"layers: \[3\], but the transformer has 3 blocks; set numbers .* 2$",
        ),
        ({"skip_guidance_layers": [1], "guidance": 1.0}, "skip_guidance_layers: is part of classifier-free guidance"),
    ],
)
def test_skip_layer_guidance_that_has_no_effect_is_refused(
    sd35_medium: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings).check(source(sd35_medium).facts)


def test_skip_layer_guidance_of_a_unet_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"skip_guidance_layers: SD 1.x has no transformer whose blocks could be"):
        Sampling(skip_guidance_layers=[1]).check(Pretrained(str(tiny)).facts)


@pytest.mark.usefixtures("float32_t5")
@pytest.mark.parametrize("prompt", ["a dog", "", "a b c " * 40])
def test_text_embeddings_equal_those_of_the_diffusers_pipeline(sd35_medium: Path, prompt: str) -> None:
    pipe = pipeline(sd35_medium)
    states, _, pooled, _ = pipe.encode_prompt(
        prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
    )
    backbone = source(sd35_medium).load()
    with torch.no_grad():
        actual = backbone.encode_text([prompt])
    torch.testing.assert_close(actual.states, states.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.pooled, pooled, rtol=1e-4, atol=1e-5)
    shapes = {name: tuple(value.shape[1:]) for name, value in actual.tensors().items()}
    assert shapes == backbone.text_shapes == {"states": (77 + T5_TOKENS, 48), "pooled": (40,)}


def test_states_without_t5_are_zeros(sd35_medium: Path) -> None:
    with_t5, without = source(sd35_medium).load(), source(sd35_medium, t5=False).load()
    with torch.no_grad():
        expected, actual = with_t5.encode_text(["a dog"]), without.encode_text(["a dog"])
    assert torch.equal(actual.states[:, :77], expected.states[:, :77])
    assert expected.states[:, 77:].abs().max() > 0.1
    assert actual.states[:, 77:].abs().max() == 0
    assert actual.states.shape == expected.states.shape
    assert source(sd35_medium).encoder_cache_key("text_encoder", "32-true") != source(
        sd35_medium, t5=False
    ).encoder_cache_key("text_encoder", "32-true")


def test_t5_is_no_submodule_and_is_not_trainable(sd35_medium: Path) -> None:
    backbone = source(sd35_medium).load()
    assert list(backbone.encoders) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert list(backbone.trainable_encoders) == ["text_encoder", "text_encoder_2"]
    t5 = backbone.encoders["text_encoder_3"]
    assert not {id(p) for p in t5.parameters()} & {id(p) for p in backbone.parameters()}
    assert {p.dtype for p in t5.parameters()} == {torch.bfloat16}
    with backbone.encoders_on_device():
        assert t5.device == backbone.device


class Moves:
    """Records where models are moved, instead of moving them."""

    def __init__(self, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, str]] = []
        for name, model in (("denoiser", backbone.denoiser), ("t5", backbone.encoders["text_encoder_3"])):
            monkeypatch.setattr(model, "to", lambda device, name=name: self.made.append((name, str(device))))
        monkeypatch.setattr(type(backbone), "device", property(lambda _: torch.device("cuda")))


def test_denoiser_makes_room_for_t5(sd35_medium: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = source(sd35_medium).load()
    moves = Moves(backbone, monkeypatch)
    with suppress(RuntimeError), backbone.encoders_on_device():
        assert moves.made == [("denoiser", "cpu"), ("t5", "cuda")]
        raise RuntimeError
    assert moves.made[2:] == [("t5", "cpu"), ("denoiser", "cuda")]


def test_denoiser_of_other_runs_stays_where_it_is(sd35_medium: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Any = source(sd35_medium).load()
    backbone.pair_executor = object()
    moves = Moves(backbone, monkeypatch)
    with backbone.encoders_on_device():
        pass
    assert moves.made == [("t5", "cuda"), ("t5", "cpu")]


def test_t5_is_on_the_device_only_for_captions_that_are_not_cached(
    sd35_medium: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    for number in range(2):
        noise(tmp_path / "images" / f"{number}.png", 96, 80, number, f"number {number}")
    inside, happened = [False], list[str]()
    encode = SD3Backbone.encode_images

    @contextmanager
    def on_device(self: Any) -> Iterator[None]:
        inside[0], before = True, inside[0]
        happened.append("T5 comes")
        yield
        inside[0] = before

    def encode_images(self: Any, images: Tensor) -> Tensor:
        happened.append("images" if not inside[0] else "images beside T5")
        return encode(self, images)

    monkeypatch.setattr(SD3Backbone, "encoders_on_device", on_device)
    monkeypatch.setattr(SD3Backbone, "encode_images", encode_images)
    fit(LoRA(backbone=source(sd35_medium)), folder_data(tmp_path / "images"), 1)
    assert happened[:2] == ["images", "T5 comes"]
    assert "images beside T5" not in happened
    happened.clear()
    fit(LoRA(backbone=source(sd35_medium)), folder_data(tmp_path / "images"), 1)
    assert happened == []


def test_t5_stays_in_bfloat16_beside_quantized_weights(sd35_medium: Path) -> None:
    backbone = load_to_generate(source(sd35_medium, quantize="int8"), torch.device("cpu"), torch.float16)
    t5 = backbone.encoders["text_encoder_3"]
    assert {p.dtype for p in t5.parameters() if p.is_floating_point()} == {torch.bfloat16}
    quantized = {name for name, layer in backbone.denoiser.named_modules() if isinstance(layer, Quantized)}
    assert "transformer_blocks.0.attn.to_q" in quantized
    assert not [name for name in quantized if ".norm" in name]


def test_artifacts_fit_the_model_with_and_without_t5(sd35_medium: Path) -> None:
    assert source(sd35_medium).hash() == source(sd35_medium, t5=False).hash()
    assert source(sd35_medium).image_cache_key() != source(sd35_medium, t5=False).image_cache_key()


def test_model_that_was_trained_without_t5_loads_without_it(sd35_medium: Path, tmp_path: Path) -> None:
    model = Full(backbone=source(sd35_medium, t5=False))
    model.configure_model()
    model.artifact(tmp_path, "it")
    pipe = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "it", text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    assert pipe.text_encoder_3 is None
    assert pipe.tokenizer_3 is None
    assert list(source(tmp_path / "it", t5=False).load().encoders) == ["text_encoder", "text_encoder_2"]


def test_tokenizer_of_t5_may_be_a_sentencepiece_model(sd35_medium: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a dog on the red house\n" * 50, encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spiece"), vocab_size=24,
        hard_vocab_limit=False, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=3,
    )  # fmt: skip
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"extra_ids": 0}', encoding="utf-8")
    (tmp_path / "spiece.model").rename(tmp_path / "tokenizer/spiece.model")
    backbone = source(sd35_medium, tokenizer_3=str(tmp_path / "tokenizer")).load()
    [ids] = backbone._t5_ids(["a dog"])
    assert len(ids) == T5_TOKENS
    assert 1 in ids
    assert ids[-1] == 0
    assert 2 not in ids[: ids.index(1)]


def test_tokenizer_of_t5_may_be_in_a_pipeline(sd35_medium: Path) -> None:
    given = source(sd35_medium, tokenizer_3=str(sd35_medium)).load()
    assert given.token_ids(["a b"], "text_encoder_3") == source(sd35_medium).load().token_ids(["a b"], "text_encoder_3")


def test_images_beyond_the_position_table_are_refused(sd35_medium: Path) -> None:
    facts = source(sd35_medium).facts
    assert facts.largest_side == 12 * 2 * 8
    with pytest.raises(UserError, match=r"^sampling\.width: 208 pixels, but the position table ends at 192; set"):
        Sampling(width=208).check(facts)


def test_vectors_of_a_word_fit_into_the_tokens_of_their_encoder(sd35_medium: Path, tmp_path: Path) -> None:
    noise(tmp_path / "images/0.png", 96, 80, 0, "number")
    word, data = NewToken("<new>", "a", 20), folder_data(tmp_path / "images", templates=["<new> {}"])
    model = TextualInversion(backbone=source(sd35_medium), new_tokens=[word], encoders=["text_encoder_3"])
    with pytest.raises(UserError, match=r"20 vectors, but a prompt of text_encoder_3 has room for 19; .*t5_tokens"):
        fit(model, data, 1)
    fit(TextualInversion(backbone=source(sd35_medium), new_tokens=[word]), data, 1)


def test_parameters_without_effect_are_reported(sd35_medium: Path) -> None:
    backbone: Backbone = source(sd35_medium).load()
    backbone.denoiser.requires_grad_(True)
    with torch.no_grad():
        conditioning = backbone.encode_text(["a dog"])
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    backbone.predict(noisy, torch.tensor([500.0]), conditioning).square().sum().backward()
    without = {n for n, p in backbone.denoiser.named_parameters() if p.grad is None or not p.grad.any()}
    frozen = backbone.frozen_prefixes("denoiser")
    assert without == {n for n, _ in backbone.denoiser.named_parameters() if n.startswith(frozen)}
    assert len(without) == 3  # weight and bias of the projection, and the norm


# --- single files


def test_encoder_file_may_have_tensors_without_use(sd35_medium: Path, single: Path) -> None:
    file = text_encoder_file(single, "clip_l")
    tensors = load_file(file)
    save_file(
        {**tensors, "logit_scale": torch.ones(()), "text_model.embeddings.position_ids": torch.zeros(1, 77)}, file
    )
    model = source(without(single, "clip_l."), text_encoder=str(file), config=str(sd35_medium))
    assert model.load().encoders["text_encoder"] is not None


def test_all_missing_parts_are_named_at_once(single: Path) -> None:
    message = (
        r"contains no VAE, text_encoder, text_encoder_2, text_encoder_3; set backbone\.vae=FILE"
        r" backbone\.text_encoder=FILE .*, or backbone\.t5=false$"
    )
    with pytest.raises(UserError, match=message):
        source(without(single, "first_stage", "text_encoders")).check()


@pytest.fixture
def single(sd35_medium: Path, tmp_path: Path) -> Path:
    """All models in one file of the original layout."""
    model = source(sd35_medium)
    write_single_file(model.load(), model, tmp_path / "it.safetensors", torch.float32, {})
    return tmp_path / "it.safetensors"


def without(file: Path, *parts: str) -> Path:
    tensors = {key: value for key, value in load_file(file).items() if not any(part in key for part in parts)}
    target = file.with_name(f"without-{len(tensors)}.safetensors")
    save_file(tensors, target)
    return target


def text_encoder_file(file: Path, name: str) -> Path:
    prefix = f"text_encoders.{name}.transformer."
    tensors = {key.removeprefix(prefix): value for key, value in load_file(file).items() if key.startswith(prefix)}
    save_file(tensors, file.with_name(f"{name}.safetensors"))
    return file.with_name(f"{name}.safetensors")


def is_equal(one: Backbone, other: Backbone) -> bool:
    state, expected = one.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in state.items())


def test_single_file_loads_the_same_model(sd35_medium: Path, single: Path) -> None:
    settings = {"config": str(sd35_medium), "tokenizer_3": str(sd35_medium / "tokenizer_3")}
    model = source(single, family="sd35_medium", **settings)
    model.check()
    loaded, expected = model.load(), source(sd35_medium).load()
    assert is_equal(loaded, expected)
    with torch.no_grad():
        one, other = loaded.encode_text(["a dog"]), expected.encode_text(["a dog"])
    assert torch.equal(one.states, other.states)
    assert model.facts.prediction_type == "flow_prediction"


def test_text_encoders_come_from_files_beside_the_model(sd35_medium: Path, single: Path) -> None:
    bare = without(single, "text_encoders.")
    files = {
        "text_encoder": str(text_encoder_file(single, "clip_l")),
        "text_encoder_2": str(text_encoder_file(single, "clip_g")),
        "text_encoder_3": str(text_encoder_file(single, "t5xxl")),
    }
    settings = {"config": str(sd35_medium), "tokenizer_3": str(sd35_medium / "tokenizer_3")}
    model = source(bare, **settings, **files)
    model.check()
    assert is_equal(model.load(), source(sd35_medium).load())
    del files["text_encoder_3"]
    model = source(bare, config=str(sd35_medium), t5=False, **files)
    model.check()
    assert is_equal(model.load(), source(sd35_medium, t5=False).load())


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        (("clip_l.",), {}, r"contains no text_encoder; set backbone\.text_encoder=FILE$"),
        (("clip_g",), {}, r"contains no text_encoder_2; set backbone\.text_encoder_2=FILE$"),
        (("t5xxl",), {}, r"contains no text_encoder_3; set backbone\.text_encoder_3=FILE, or backbone\.t5=false$"),
        (("first_stage_model",), {}, r"contains no VAE; set backbone\.vae="),
        ((), {"family": "sdxl"}, r"is SD 3\.5 medium, but backbone=sdxl requires SDXL; use backbone=sd35_medium$"),
    ],
)
def test_incomplete_files_and_other_families_are_refused(
    sd35_medium: Path, single: Path, parts: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        source(without(single, *parts) if parts else single, config=str(sd35_medium), **settings).check()
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_of_t5_is_refused(sd35_medium: Path, single: Path, tmp_path: Path) -> None:
    config = tmp_path / "config"
    shutil.copytree(sd35_medium, config)
    shutil.rmtree(config / "tokenizer_3")
    with pytest.raises(UserError, match=r"^backbone\.tokenizer_3: .* has no T5 tokenizer; set it to a folder"):
        source(single, config=str(config)).check()
    source(single, config=str(config), t5=False).check()


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "epsilon"}, r"^backbone\.prediction_type: got epsilon, but .* states flow_prediction"),
        ({"zero_terminal_snr": True}, r"^backbone\.zero_terminal_snr: has no meaning for a flow model"),
        ({"max_tokens": 150}, r"^backbone\.max_tokens: the CLIP text encoders of SD 3\.5 medium read 75 tokens"),
        ({"family": "sd1"}, r"is SD 3\.5 medium, but backbone=sd15 requires SD 1\.x; use backbone=sd35_medium"),
    ],
)
def test_settings_that_do_not_fit_are_refused(sd35_medium: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = source(sd35_medium, **settings).facts


def test_text_encoder_file_for_another_family_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"^backbone\.text_encoder: .* has no place for it; remove it"):
        _ = Pretrained(str(tiny), text_encoder="it.safetensors").facts


def test_shift_is_that_of_the_config_or_of_the_setting(sd35_medium: Path) -> None:
    assert source(sd35_medium).load().path.shift == 3.0
    shifted = source(sd35_medium, flow_shift=1.5).load()
    assert (shifted.path.shift, shifted.scheduler_config["shift"]) == (1.5, 1.5)


def test_sides_are_multiples_of_patches(sd35_medium: Path) -> None:
    facts = source(sd35_medium).facts
    facts.check_side(64, "data.resolution")
    with pytest.raises(UserError, match="multiple of 16"):
        facts.check_side(72, "data.resolution")


@pytest.mark.parametrize(("sampler", "message"), [("ddim", "ddim cannot sample a flow model; set euler or dpmpp_2m")])
def test_samplers_of_diffusion_models_are_refused(sd35_medium: Path, sampler: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(steps=4, sampler=sampler).check(source(sd35_medium).facts)


class OnePoint:
    """A predictor with the exact velocity of a data distribution of one point, (z_t - x) / t."""

    condition_encoder = None

    def __init__(self, point: Tensor) -> None:
        self.point, self.times = point, list[float]()

    def denoise(self, noisy: Tensor, timesteps: Tensor, *_: Any) -> Tensor:
        self.times.append(float(timesteps) / 1000)
        return (noisy - self.point) / self.times[-1]


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_samplers_of_flows_give_the_denoiser_the_times_of_their_steps(
    sd35_medium: Path, sampler: Any, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = source(sd35_medium, flow_shift=shift).load()
    exact, latents = OnePoint(torch.full((1, 4, 8, 8), 0.5)), list[Tensor]()
    monkeypatch.setattr(backbone, "decode", lambda z: (latents.append(z), z[:, :3])[1])
    next(generate(backbone, [Request("", 4)], Sampling(steps=100, guidance=1.0, sampler=sampler), exact))
    assert float((latents[0] - exact.point).abs().max()) < 1e-3
    assert len(set(exact.times)) == 100
    assert exact.times == sorted(exact.times, reverse=True)
    # The shift of the middle of the times: t = s u / (1 + (s - 1) u), twice in FlowMatchEulerDiscreteScheduler.
    middle = shift * 0.5 / (1 + (shift - 1) * 0.5)
    if sampler == "dpmpp_2m":
        assert exact.times[50] == pytest.approx(middle, abs=0.02)


def test_configs_of_other_transformers_are_refused(sd35_medium: Path, tmp_path: Path) -> None:
    shutil.copytree(sd35_medium, tmp_path / "other")
    file = tmp_path / "other/transformer/config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "_class_name": "FluxTransformer2DModel"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"is the config of a FluxTransformer2DModel that sdtune cannot train"):
        _ = source(tmp_path / "other").facts
    assert source(sd35_medium).facts.family is SD35_MEDIUM
