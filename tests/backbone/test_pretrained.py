"""Backbones from pipeline folders: properties from configs, loading of weights, text embeddings, prediction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError

from sdtune.backbone import Facts, Pretrained
from sdtune.backbone.families import SD1
from sdtune.conditioning import Conditioning
from sdtune.errors import UserError


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline folder that a test may change."""
    shutil.copytree(tiny, tmp_path / "copy")
    return tmp_path / "copy"


def update_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


DDIM = "DDIMScheduler"

# --- facts


def test_facts_are_read_from_the_config_files_alone(tiny: Path, copy: Path) -> None:
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    expected = Facts(
        side=32,
        factor=4,
        latent_channels=4,
        prediction_type="epsilon",
        max_tokens=77,
        family=SD1,
        scheduler=DDIM,
        min_steps=4,
    )
    assert Pretrained(str(copy)).facts == Pretrained(str(tiny)).facts == expected


def test_prediction_type_comes_from_the_scheduler_config(copy: Path) -> None:
    update_json(copy / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    source = Pretrained(str(copy))
    assert source.facts.prediction_type == "v_prediction"
    assert source.load().path.prediction_type == "v_prediction"


def refiner(folder: Path) -> None:
    second = ["transformers", "CLIPTextModelWithProjection"]
    update_json(folder / "model_index.json", text_encoder=[None, None], text_encoder_2=second)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a refiner": (refiner, r"is the SDXL refiner"),
    "EDM": (
        lambda f: update_json(f / "scheduler/scheduler_config.json", _class_name="EDMEulerScheduler", sigma_data=0.5),
        r"the scheduler config \(EDMEulerScheduler\) is that of an EDM model",
    ),
    "a shift by image size": (
        lambda f: update_json(
            f / "scheduler/scheduler_config.json",
            _class_name="FlowMatchEulerDiscreteScheduler",
            use_dynamic_shifting=True,
        ),
        r"\(FlowMatchEulerDiscreteScheduler\) shifts the noise levels by the image size",
    ),
    "no betas": (
        lambda f: update_json(f / "scheduler/scheduler_config.json", beta_start=None),
        r"beta_start is missing in the scheduler config; add num_train_timesteps, beta_start",
    ),
    "normalized latents": (
        lambda f: update_json(f / "vae/config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        r"the VAE of .* normalizes its latents with latents_mean and latents_std",
    ),
    "inpainting": (
        lambda f: update_json(f / "unet/config.json", in_channels=9),
        r"has 9 input channels \(an inpainting model\?\)",
    ),
    "no index": (lambda f: (f / "model_index.json").unlink(), r"model_index\.json is missing"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), r"unet/config\.json is missing"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), r"scheduler/scheduler_config\.json is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_pipeline_is_refused_in_one_line(copy: Path, case: str) -> None:
    modify, message = REFUSED[case]
    modify(copy)
    with pytest.raises(UserError, match=rf"^backbone\.path: .*{message}") as caught:
        _ = Pretrained(str(copy)).facts
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "~/no-such-folder", "nothing", "a/b/c"])
def test_missing_folder_is_refused_without_a_hub_request(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise AssertionError("unexpected request to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=rf"^backbone\.path: {path} does not exist"):
        _ = Pretrained(path).facts


def test_unavailable_hub_id_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **settings: Any) -> None:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        UserError, match=r"^backbone\.path: some/model .*hub \(no network\); use a folder, a file or a hub id$"
    ):
        _ = Pretrained("some/model").facts


def test_facts_request_only_json_from_the_hub_and_weights_no_pickle(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested_patterns: list[str] = []
    calls: list[tuple[str | None, bool]] = []

    def snapshot(path: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert path == "some/model"
        calls.append((revision, local_files_only))
        requested_patterns.extend(allow_patterns)
        if local_files_only and len(calls) == 1:
            raise LocalEntryNotFoundError("not in the cache")
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    source = Pretrained("some/model", revision="main")
    assert source.facts.side == 32
    assert not any("safetensors" in pattern for pattern in requested_patterns)
    assert calls == [("main", True), ("main", False)]
    assert source.folder() == tiny
    # Cached files are used, at the commit that the first call resolved.
    assert calls[2:] == [(tiny.name, True)]
    assert (source.revision, source.commit) == ("main", tiny.name)
    assert Pretrained(str(tiny)).commit is None

    def is_requested(file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in requested_patterns)

    for component in ("unet", "vae", "text_encoder"):
        assert is_requested(f"{component}/model.safetensors")
        assert is_requested(f"{component}/diffusion_pytorch_model.safetensors")
        assert is_requested(f"{component}/diffusion_pytorch_model-00001-of-00002.safetensors")
        assert not is_requested(f"{component}/diffusion_pytorch_model.fp16.safetensors")
        assert not is_requested(f"{component}/diffusion_pytorch_model.bin")
    assert not is_requested("v1-5-pruned.ckpt")
    assert not is_requested("safety_checker/model.safetensors")


# --- weights


def test_loaded_backbone_is_frozen_float32_and_in_eval_mode(tiny: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    assert sum(1 for _ in backbone.parameters()) > 100
    assert not any(p.requires_grad for p in backbone.parameters())
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert not any(m.training for m in backbone.modules())


def test_half_precision_files_are_loaded_in_float32(tiny: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, torch_dtype=torch.float16, safety_checker=None)
    pipeline.save_pretrained(tmp_path / "half")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny / "tokenizer" / name, tmp_path / "half/tokenizer" / name)
    backbone = Pretrained(str(tmp_path / "half")).load()
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_weights_equal_those_loaded_by_diffusers(tiny: Path) -> None:
    backbone, pipeline = (
        Pretrained(str(tiny)).load(),
        StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None),
    )
    for component in ("unet", "vae", "text_encoder"):
        actual = getattr(backbone, "denoiser" if component == "unet" else component).state_dict()
        expected = getattr(pipeline, component).state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in actual)
    torch.testing.assert_close(
        backbone.path.schedule.alphas_cumprod.float(), pipeline.scheduler.alphas_cumprod, rtol=2e-4, atol=1e-8
    )


def test_pickled_weights_are_never_read(copy: Path) -> None:
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(UserError, match=r"unet contains no .*safetensors"):
        Pretrained(str(copy)).hash()
    with pytest.raises(UserError, match="is a pickle, which can execute code"):
        Pretrained(str(copy)).load()


def test_weights_from_scratch_depend_only_on_the_seed(copy: Path) -> None:
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()

    def weights(seed: int) -> dict[str, torch.Tensor]:
        backbone = Pretrained(str(copy), from_scratch=["denoiser"]).load(seed)
        assert not any(p.requires_grad for p in backbone.parameters())
        return {name: p.clone() for name, p in backbone.named_parameters()}

    torch.manual_seed(1)
    first, rng_state = weights(5), torch.get_rng_state()
    torch.manual_seed(2)
    second, third = weights(5), weights(6)
    assert all(torch.equal(first[name], second[name]) for name in first)
    random_names = [name for name, p in first.items() if name.startswith("denoiser.") and p.dim() > 1]
    assert not any(torch.equal(first[name], third[name]) for name in random_names)
    assert all(torch.equal(first[name], third[name]) for name in first if not name.startswith("denoiser."))
    torch.manual_seed(1)
    assert torch.equal(rng_state, torch.get_rng_state())  # the global generator is unchanged


@pytest.mark.parametrize("component", ["denoiser", "text_encoder", "vae"])
def test_each_component_can_be_initialized_randomly(tiny: Path, component: str) -> None:
    pretrained, from_scratch = Pretrained(str(tiny)).load(), Pretrained(str(tiny), from_scratch=[component]).load(3)
    for name in ("denoiser", "text_encoder", "vae"):
        weights, other_weights = getattr(pretrained, name).state_dict(), getattr(from_scratch, name).state_dict()
        assert weights.keys() == other_weights.keys()
        assert all(torch.equal(weights[key], other_weights[key]) for key in weights) == (name != component)


def test_hash_omits_components_from_scratch(tiny: Path, copy: Path) -> None:
    pretrained, without_unet = Pretrained(str(tiny)), Pretrained(str(tiny), from_scratch=["denoiser"])
    assert pretrained.hash() == Pretrained(str(copy)).hash() != without_unet.hash()
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert Pretrained(str(copy), from_scratch=["denoiser"]).hash() == without_unet.hash()
    assert (
        len(
            {
                pretrained.encoder_cache_key("vae", "32-true"),
                pretrained.encoder_cache_key("unet", "32-true"),
                pretrained.hash(),
            }
        )
        == 3
    )


# --- encode, predict, decode


def test_latents_are_a_scaled_sample_of_the_posterior(tiny: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        moments = backbone.encode_images(images)
        posterior = backbone.vae.encode(images).latent_dist
    assert moments.shape == (2, 8, 8, 8)
    noise = torch.randn(2, 4, 8, 8)
    expected = (posterior.mean + posterior.std * noise) * 0.4
    torch.testing.assert_close(backbone.latents(moments, noise), expected)
    torch.testing.assert_close(backbone.latents(moments, torch.zeros_like(noise)), posterior.mode() * 0.4)


def test_shift_factor_of_the_vae_applies_to_encoding_and_decoding(copy: Path) -> None:
    update_json(copy / "vae/config.json", shift_factor=0.25, scaling_factor=0.5)
    backbone = Pretrained(str(copy)).load()
    moments = torch.randn(1, 8, 8, 8)
    latents = backbone.latents(moments, torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(latents, (moments[:, :4] - 0.25) * 0.5)
    with torch.no_grad():
        expected = (backbone.vae.decode(moments[:, :4]).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(backbone.decode(latents), expected, rtol=1e-4, atol=1e-5)


def test_text_embeddings_equal_those_of_the_diffusers_pipeline(tiny: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    for prompt in ("a dog", "", "a " * 100):
        expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        torch.testing.assert_close(backbone.encode_text([prompt]).states, expected)
    assert backbone.tokenize(["a dog", "a " * 100]).shape == (2, 77)
    assert backbone.token_ids(["ab"]) == backbone.token_ids(["AB"])
    assert len(backbone.token_ids(["a " * 100])[0]) == 100


def test_predict_returns_the_unet_output_in_its_dtype(tiny: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    noisy, text, timesteps = torch.randn(2, 4, 8, 8), Conditioning(torch.randn(2, 77, 32)), torch.tensor([3, 900])
    with torch.no_grad():
        out = backbone.predict(noisy, timesteps, text)
        assert torch.equal(out, backbone.denoiser(noisy, timesteps, text.states).sample)
        backbone.prepare_for_device(torch.device("cpu"))
        torch.testing.assert_close(backbone.predict(noisy, timesteps, text), out, rtol=1e-4, atol=1e-5)
        backbone.denoiser.bfloat16()
        assert backbone.predict(noisy, timesteps, text).dtype == torch.bfloat16


# --- clip skip and long prompts


def test_clip_skip_is_counted_as_in_diffusers(tiny: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    # diffusers 0.42 expects the encoder's layers in `text_model`, as in transformers before 5.6.
    pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder
    unskipped = Pretrained(str(tiny)).load().encode_text(["a dog"]).states
    for skip in (1,):
        expected, _ = pipeline.encode_prompt("a dog", "cpu", 1, do_classifier_free_guidance=False, clip_skip=skip)
        actual = Pretrained(str(tiny), clip_skip=skip).load().encode_text(["a dog"]).states
        torch.testing.assert_close(actual, expected)
        assert not torch.allclose(actual, unskipped)


def test_layers_skipped_by_clip_skip_are_reported_as_unused(tiny: Path) -> None:
    backbone = Pretrained(str(tiny), clip_skip=1).load()
    backbone.text_encoder.requires_grad_(True)
    backbone.encode_text(["a dog"]).states.sum().backward()
    without_gradient = {name for name, p in backbone.text_encoder.named_parameters() if p.grad is None}
    assert without_gradient
    assert without_gradient == {
        n for n, _ in backbone.text_encoder.named_parameters() if n.startswith(backbone.frozen_prefixes("text_encoder"))
    }
    assert Pretrained(str(tiny)).load().frozen_prefixes("text_encoder") == ()


def test_long_prompt_is_encoded_in_windows(tiny: Path) -> None:
    source = Pretrained(str(tiny), max_tokens=150)
    backbone, plain = source.load(), Pretrained(str(tiny)).load()
    assert (source.facts.max_tokens, source.facts.windows, backbone.text_shapes) == (152, 2, {"states": (154, 32)})
    first, second = " ".join("abcdefghij" * 7 + "abcde"), "x y z"
    embeddings = backbone.encode_text([f"{first} {second}", "a dog"]).states
    assert embeddings.shape == (2, 154, 32)
    torch.testing.assert_close(embeddings[0, :77], plain.encode_text([first]).states[0])
    torch.testing.assert_close(embeddings[0, 77:], plain.encode_text([second]).states[0])
    torch.testing.assert_close(embeddings[1], plain.encode_text(["a dog", ""]).states.flatten(0, 1))
    assert Pretrained(str(tiny), max_tokens=225).facts.windows == 3
    assert Pretrained(str(tiny), max_tokens=75).load().text_shapes == plain.text_shapes


def test_cache_keys_of_text_differ_by_clip_skip_and_windows(tiny: Path) -> None:
    sources = [Pretrained(str(tiny), clip_skip=skip, max_tokens=tokens) for skip in (0, 1) for tokens in (None, 150)]
    assert len({source.encoder_cache_key("text_encoder", "32-true") for source in sources}) == 4
    assert len({source.image_cache_key() for source in sources}) == 4
    assert len({source.encoder_cache_key("vae", "32-true") for source in sources}) == 1


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet/config.json", "in_channels", None),
        ("unet/config.json", "sample_size", []),
        ("vae/config.json", "block_out_channels", None),
        ("text_encoder/config.json", "max_position_embeddings", "x"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "x"),
        ("tokenizer/tokenizer_config.json", "model_max_length", [77]),
    ],
)
def test_damaged_config_is_one_line(tiny: Path, tmp_path: Path, file: str, key: str, value: object) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / file).read_text(encoding="utf-8"))
    config[key] = value
    (folder / file).write_text(json.dumps(config), encoding="utf-8")
    source = Pretrained(str(folder))
    with pytest.raises(UserError, match=r"^backbone\.path: "):
        _read(source)


def test_tokenizer_with_ids_without_embedding_is_one_line(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny, folder)
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary | {"a</w>": 5000}), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"^backbone\.path: the tokenizer of .* has the token id 5000, but .* embeddings"
    ):
        _read(Pretrained(str(folder)))


def _read(source: Pretrained) -> None:
    assert source.facts.side
    source.check()
    source.load()
