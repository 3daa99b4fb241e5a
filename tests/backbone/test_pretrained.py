"""A backbone from its folder: what is known before the weights, and how they are loaded."""

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
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from huggingface_hub.errors import LocalEntryNotFoundError

from sdtune.backbone import Facts, Pretrained
from sdtune.errors import UserError


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(tiny, tmp_path / "copy")
    return tmp_path / "copy"


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# --- facts


def test_facts_come_from_the_config_files_alone(tiny: Path, copy: Path) -> None:
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    wanted = Facts(side=32, factor=4, latent_channels=4, prediction_type="epsilon", max_tokens=77)
    assert Pretrained(str(copy)).facts == Pretrained(str(tiny)).facts == wanted


def test_the_prediction_type_is_the_schedulers(copy: Path) -> None:
    change(copy / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    source = Pretrained(str(copy))
    assert source.facts.prediction_type == "v_prediction"
    assert source.load().prediction_type == "v_prediction"


def refiner(folder: Path) -> None:
    second = ["transformers", "CLIPTextModelWithProjection"]
    change(folder / "model_index.json", text_encoder=[None, None], text_encoder_2=second)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a refiner": (refiner, r"is SDXL's refiner"),
    "inpainting": (
        lambda f: change(f / "unet/config.json", in_channels=9),
        r"takes 9 channels \(an inpainting model\?\)",
    ),
    "no index": (lambda f: (f / "model_index.json").unlink(), r"model_index\.json is missing"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), r"unet/config\.json is missing"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), r"scheduler/scheduler_config\.json is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_stable_diffusion_is_refused_in_one_line(copy: Path, case: str) -> None:
    spoil, words = REFUSED[case]
    spoil(copy)
    with pytest.raises(UserError, match=rf"^backbone\.path: .*{words}") as caught:
        _ = Pretrained(str(copy)).facts
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "~/no-such-folder", "nothing", "a/b/c"])
def test_a_missing_folder_is_refused_and_not_looked_for_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **settings: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    with pytest.raises(UserError, match=rf"^backbone\.path: {path} does not exist"):
        _ = Pretrained(path).facts


def test_a_hub_id_that_is_not_to_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **settings: Any) -> None:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"^backbone\.path: some/model .*hub \(no network\)$"):
        _ = Pretrained("some/model").facts


def test_only_json_is_asked_of_the_hub_for_facts_and_never_a_pickle(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    calls: list[tuple[str | None, bool]] = []

    def snapshot(path: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert path == "some/model"
        calls.append((revision, local_files_only))
        asked.extend(allow_patterns)
        if local_files_only and len(calls) == 1:
            raise LocalEntryNotFoundError("nothing here yet")
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    source = Pretrained("some/model", revision="main")
    assert source.facts.side == 32
    assert not any("safetensors" in pattern for pattern in asked)
    assert calls == [("main", True), ("main", False)]
    assert source.folder() == tiny
    # What lies in the cache is taken, by the commit that the first answer named.
    assert calls[2:] == [(tiny.name, True)]
    assert (source.revision, source.commit) == ("main", tiny.name)
    assert Pretrained(str(tiny)).commit is None

    def wanted(file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in asked)

    for component in ("unet", "vae", "text_encoder"):
        assert wanted(f"{component}/model.safetensors")
        assert wanted(f"{component}/diffusion_pytorch_model.safetensors")
        assert wanted(f"{component}/diffusion_pytorch_model-00001-of-00002.safetensors")
        assert not wanted(f"{component}/diffusion_pytorch_model.fp16.safetensors")
        assert not wanted(f"{component}/diffusion_pytorch_model.bin")
    assert not wanted("v1-5-pruned.ckpt")
    assert not wanted("safety_checker/model.safetensors")


# --- weights


def test_everything_is_frozen_float32_and_in_eval_mode(tiny: Path) -> None:
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


def test_the_weights_are_those_of_plain_diffusers(tiny: Path) -> None:
    ours, theirs = Pretrained(str(tiny)).load(), StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    for component in ("unet", "vae", "text_encoder"):
        one, other = getattr(ours, component).state_dict(), getattr(theirs, component).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    torch.testing.assert_close(
        ours.schedule.alphas_cumprod.float(), theirs.scheduler.alphas_cumprod, rtol=2e-4, atol=1e-8
    )


def test_pickled_weights_are_never_read(copy: Path) -> None:
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(UserError, match=r"unet holds no .*safetensors"):
        Pretrained(str(copy)).hash()
    with pytest.raises(UserError, match="is a pickle, which can carry code"):
        Pretrained(str(copy)).load()


def test_what_is_from_scratch_is_a_function_of_the_seed(copy: Path) -> None:
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()

    def weights(seed: int) -> dict[str, torch.Tensor]:
        backbone = Pretrained(str(copy), from_scratch=["unet"]).load(seed)
        assert not any(p.requires_grad for p in backbone.parameters())
        return {name: p.clone() for name, p in backbone.named_parameters()}

    torch.manual_seed(1)
    first, state = weights(5), torch.get_rng_state()
    torch.manual_seed(2)
    second, third = weights(5), weights(6)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name, p in first.items() if name.startswith("unet.") and p.dim() > 1]
    assert not any(torch.equal(first[name], third[name]) for name in drawn)
    assert all(torch.equal(first[name], third[name]) for name in first if not name.startswith("unet."))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # nor does it touch the global generator


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_each_component_can_be_drawn_anew(tiny: Path, component: str) -> None:
    read, drawn = Pretrained(str(tiny)).load(), Pretrained(str(tiny), from_scratch=[component]).load(3)
    for name in ("unet", "text_encoder", "vae"):
        one, other = getattr(read, name).state_dict(), getattr(drawn, name).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one) == (name != component)


def test_the_hash_leaves_out_what_is_drawn_anew(tiny: Path, copy: Path) -> None:
    whole, without = Pretrained(str(tiny)), Pretrained(str(tiny), from_scratch=["unet"])
    assert whole.hash() == Pretrained(str(copy)).hash() != without.hash()
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert Pretrained(str(copy), from_scratch=["unet"]).hash() == without.hash()
    assert len({whole.encoder_key("vae", "32-true"), whole.encoder_key("unet", "32-true"), whole.hash()}) == 3


# --- encode, predict, decode


def test_latents_are_a_draw_from_the_posterior_scaled(tiny: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        moments = backbone.encode_images(images)
        posterior = backbone.vae.encode(images).latent_dist
    assert moments.shape == (2, 8, 8, 8)
    noise = torch.randn(2, 4, 8, 8)
    wanted = (posterior.mean + posterior.std * noise) * 0.4
    torch.testing.assert_close(backbone.latents(moments, noise), wanted)
    torch.testing.assert_close(backbone.latents(moments, torch.zeros_like(noise)), posterior.mode() * 0.4)


def test_a_shift_of_the_vae_is_heeded_both_ways(copy: Path) -> None:
    change(copy / "vae/config.json", shift_factor=0.25, scaling_factor=0.5)
    backbone = Pretrained(str(copy)).load()
    moments = torch.randn(1, 8, 8, 8)
    latents = backbone.latents(moments, torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(latents, (moments[:, :4] - 0.25) * 0.5)
    with torch.no_grad():
        wanted = (backbone.vae.decode(moments[:, :4]).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(backbone.decode(latents), wanted, rtol=1e-4, atol=1e-5)


def test_text_is_what_the_pipeline_of_diffusers_conditions_on(tiny: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    for prompt in ("a dog", "", "a " * 100):
        theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        torch.testing.assert_close(backbone.encode_text([prompt]), theirs)
    assert backbone.tokenize(["a dog", "a " * 100]).shape == (2, 77)
    assert backbone.count_tokens("ab") == 4
    assert backbone.count_tokens("a " * 100) == 102


def test_predict_is_the_unets_output_in_its_dtype(tiny: Path) -> None:
    backbone = Pretrained(str(tiny)).load()
    noisy, text, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32), torch.tensor([3, 900])
    with torch.no_grad():
        out = backbone.predict(noisy, timesteps, text)
        assert torch.equal(out, backbone.unet(noisy, timesteps, text).sample)
        backbone.prepare_for_device(torch.device("cpu"))
        torch.testing.assert_close(backbone.predict(noisy, timesteps, text), out, rtol=1e-4, atol=1e-5)
        backbone.unet.bfloat16()
        assert backbone.predict(noisy, timesteps, text).dtype == torch.bfloat16


# --- clip skip and long prompts


def test_clip_skip_counts_as_diffusers_does(tiny: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    # diffusers 0.42 looks for the encoder's layers where transformers before 5.6 had them.
    pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder
    plain = Pretrained(str(tiny)).load().encode_text(["a dog"])
    for skip in (1,):
        theirs, _ = pipeline.encode_prompt("a dog", "cpu", 1, do_classifier_free_guidance=False, clip_skip=skip)
        ours = Pretrained(str(tiny), clip_skip=skip).load().encode_text(["a dog"])
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, plain)


def test_layers_behind_a_clip_skip_are_named(tiny: Path) -> None:
    backbone = Pretrained(str(tiny), clip_skip=1).load()
    backbone.text_encoder.requires_grad_(True)
    backbone.encode_text(["a dog"]).sum().backward()
    dead = {name for name, p in backbone.text_encoder.named_parameters() if p.grad is None}
    assert dead
    assert dead == {
        n for n, _ in backbone.text_encoder.named_parameters() if n.startswith(backbone.unused("text_encoder"))
    }
    assert Pretrained(str(tiny)).load().unused("text_encoder") == ()


def test_a_long_prompt_is_read_in_windows(tiny: Path) -> None:
    source = Pretrained(str(tiny), max_tokens=150)
    backbone, plain = source.load(), Pretrained(str(tiny)).load()
    assert (source.facts.max_tokens, source.facts.windows, backbone.text_shape) == (152, 2, (154, 32))
    first, second = " ".join("abcdefghij" * 7 + "abcde"), "x y z"
    states = backbone.encode_text([f"{first} {second}", "a dog"])
    assert states.shape == (2, 154, 32)
    torch.testing.assert_close(states[0, :77], plain.encode_text([first])[0])
    torch.testing.assert_close(states[0, 77:], plain.encode_text([second])[0])
    torch.testing.assert_close(states[1], torch.cat([plain.encode_text(["a dog"])[0], plain.encode_text([""])[0]]))
    assert Pretrained(str(tiny), max_tokens=225).facts.windows == 3
    assert Pretrained(str(tiny), max_tokens=75).load().text_shape == plain.text_shape


def test_caches_of_text_are_apart_by_clip_skip_and_windows(tiny: Path) -> None:
    sources = [Pretrained(str(tiny), clip_skip=skip, max_tokens=tokens) for skip in (0, 1) for tokens in (None, 150)]
    assert len({source.encoder_key("text_encoder", "32-true") for source in sources}) == 4
    assert len({source.drawing_key() for source in sources}) == 4
    assert len({source.encoder_key("vae", "32-true") for source in sources}) == 1


def test_injected_attention_processors_stay(tiny: Path) -> None:
    class Injected(AttnProcessor2_0):
        """As a method such as an IP-Adapter sets one."""

    backbone = Pretrained(str(tiny)).load()
    own = backbone.unet.attn_processors
    injected = next(iter(own))
    backbone.unet.set_attn_processor({**own, injected: Injected()})
    backbone.prepare_for_device(torch.device("cpu"))
    kinds = {name: type(processor) for name, processor in backbone.unet.attn_processors.items()}
    assert kinds.pop(injected) is Injected
    assert set(kinds.values()) == {AttnProcessor}
    backbone.prepare_for_device(torch.device("meta"))
    kinds = {name: type(processor) for name, processor in backbone.unet.attn_processors.items()}
    assert kinds.pop(injected) is Injected
    assert set(kinds.values()) == {AttnProcessor2_0}
