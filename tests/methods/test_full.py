"""Full fine-tuning: trained components, the VAE loss, and loading of the artifact in plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from running import Spy, adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.errors import UserError
from sdtune.methods import Full


def test_default_trains_only_the_unet_and_writes_a_pipeline(tiny: Path, images: Path, tmp_path: Path) -> None:
    model = Full(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3))
    spy = Spy()
    fit(model, folder_data(images), 2, [spy])
    names = {name for name, _ in model.trainable()}
    assert names == {f"backbone.denoiser.{name}" for name, _ in model.backbone.denoiser.named_parameters()}
    assert all(gradient.any() for gradient in spy.gradients[1].values())

    model.artifact(tmp_path / "artifact", "mine")
    base = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "artifact" / "mine", local_files_only=True)
    trained = model.backbone.denoiser.state_dict()
    assert loaded.unet.state_dict().keys() == trained.keys()
    for key, value in loaded.unet.state_dict().items():
        assert torch.equal(value, trained[key].contiguous()), key
    assert any(not torch.equal(v, base.unet.state_dict()[k]) for k, v in trained.items())
    for part in ("text_encoder", "vae"):
        written, original = getattr(loaded, part).state_dict(), getattr(base, part).state_dict()
        assert written.keys() == original.keys()
        assert all(torch.equal(value, original[key]) for key, value in written.items())
    for file in ("tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
        assert (tmp_path / "artifact" / "mine" / file).read_bytes() == (tiny / file).read_bytes()
    # The artifact can be used as a backbone, with another hash.
    assert Pretrained(str(tmp_path / "artifact" / "mine")).hash() != Pretrained(str(tiny)).hash()


@pytest.mark.parametrize("parts", [["text_encoder"], ["vae"], ["denoiser", "text_encoder", "vae"]])
def test_any_combination_of_components_is_trained_and_written(
    tiny: Path, images: Path, tmp_path: Path, parts: list[str]
) -> None:
    given: Any = {f"{part}_lr": rate for part, rate in (("text_encoder", 2e-3), ("vae", 3e-3)) if part in parts}
    model = Full(backbone=Pretrained(str(tiny)), parts=parts, optimizer=adamw(1e-3), **given)
    spy = Spy()
    fit(model, folder_data(images), 2, [spy])
    assert {name.split(".")[1] for name, _ in model.trainable()} == set(parts)
    rates = {"denoiser": 1e-3, "text_encoder": 2e-3, "vae": 3e-3}
    groups = model.trainer.optimizers[0].param_groups
    assert {g["name"]: g["initial_lr"] for g in groups} == {part: rates[part] for part in parts}
    without_gradient = [name for name, gradient in spy.gradients[1].items() if not gradient.any()]
    assert not without_gradient

    model.artifact(tmp_path / "artifact", "mine")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "artifact" / "mine", local_files_only=True)
    base = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
    for part, folder in (("denoiser", "unet"), ("text_encoder", "text_encoder"), ("vae", "vae")):
        written, trained, original = (
            m.state_dict() for m in (getattr(loaded, folder), getattr(model.backbone, part), getattr(base, folder))
        )
        assert written.keys() == trained.keys()
        assert all(torch.equal(value, trained[key].contiguous()) for key, value in written.items())
        assert any(not torch.equal(value, original[key]) for key, value in written.items()) is (part in parts)
    if "text_encoder" in parts:
        keys = load_file(tmp_path / "artifact" / "mine" / "text_encoder" / "model.safetensors").keys()
        assert all(key.startswith("text_model.") for key in keys)


def test_vae_is_trained_only_with_the_reconstruction_loss(tiny: Path, images: Path) -> None:
    """The VAE's gradients are those of L1 + KL, also if the UNet is trained too."""
    gradients = []
    for parts in (["vae"], ["denoiser", "vae"]):
        spy = Spy()
        fit(Full(backbone=Pretrained(str(tiny)), parts=parts, optimizer=adamw(0.0)), folder_data(images), 1, [spy])
        gradients.append({k: v for k, v in spy.gradients[0].items() if ".vae." in k})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][key], rtol=1e-5, atol=1e-7)

    model = Full(backbone=Pretrained(str(tiny)), parts=["vae"], kl_weight=0.01, seed=3)
    model.configure_model()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"pixels": pixels, "step": 2, "positions": [0, 1], "prompts": ["", ""]}
    batch["moments"] = model.backbone.encode_images(pixels)
    terms = model.extra_losses(batch)
    vae = model.backbone.vae
    posterior = vae.encode(pixels).latent_dist
    noise = model.noise((4, 8, 8), "train/vae", 2, [0, 1])
    reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
    torch.testing.assert_close(terms["loss/vae_l1"], (reconstruction - pixels).abs().mean())
    torch.testing.assert_close(terms["loss/vae_kl"], 0.01 * posterior.kl().mean() / posterior.mean[0].numel())


def test_perceptual_term_uses_the_given_clip_model(tiny: Path, images: Path) -> None:
    from sdtune.pocket import clip_path

    spy = Spy()
    model = Full(backbone=Pretrained(str(tiny)), parts=["vae"], perception=str(clip_path()), optimizer=adamw(1e-3))
    fit(model, folder_data(images), 1, [spy])
    assert {"loss/vae_l1", "loss/vae_kl", "loss/vae_perception"} <= model.step_metrics.keys()
    assert 0 < float(model.step_metrics["loss/vae_perception"]) < 1
    with pytest.raises(UserError, match=r"^method.perception: .* is not a folder"):
        Full(backbone=Pretrained(str(tiny)), parts=["vae"], perception="nowhere")
    with pytest.raises(UserError, match=r"^method.perception: only the VAE loss"):
        Full(backbone=Pretrained(str(tiny)), perception=str(clip_path()))


def test_validation_of_a_run_that_trains_only_the_vae_is_refused(tiny: Path, images: Path) -> None:
    with pytest.raises(UserError, match="^data.hold_out: the validation loss is the diffusion loss"):
        fit(Full(parts=["vae"], backbone=Pretrained(str(tiny))), folder_data(images, hold_out=2), 1)
