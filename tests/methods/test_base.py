"""Training loop of the base class, compared to the same steps with plain diffusers modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from pipelines import build_pipeline
from running import Spy, adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.errors import UserError
from sdtune.methods import Adapter, Full, LoRA
from sdtune.methods.base import check_trainable
from sdtune.objective import Objective
from sdtune.objective.weighting import MinSNR
from sdtune.randomness import generator


def stream_noise(seed: int, stream: str, step: int, positions: list[int], shape: tuple[int, ...]) -> Tensor:
    rows = [generator(seed, stream, step, p).standard_normal(shape, dtype="float32") for p in positions]
    return torch.stack([torch.from_numpy(row) for row in rows])


def test_loss_and_gradients_equal_plain_diffusers(tiny: Path) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    prompts, positions, step = ["a red fox", ""], [4, 5], 7
    model = Full(backbone=Pretrained(str(tiny)), seed=11)
    model.configure_model()
    batch = {"prompts": prompts, "step": step, "positions": positions, "pixels": pixels, "conditions": {}}
    loss = model.losses(batch)
    loss.mean().backward()

    pipe = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
        sample = posterior.mean + posterior.std * stream_noise(11, "train/vae", step, positions, (4, 8, 8))
        latents = sample * pipe.vae.config.scaling_factor
        ids = pipe.tokenizer(
            prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        text = pipe.text_encoder(ids)[0]
    noise = stream_noise(11, "train/noise", step, positions, (4, 8, 8))
    timesteps = torch.tensor([int(generator(11, "train/timestep", step, p).integers(1000)) for p in positions])
    output = pipe.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, encoder_hidden_states=text).sample
    expected = (output - noise).square().mean((1, 2, 3))
    expected.mean().backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    reference = dict(pipe.unet.named_parameters())
    for name, p in model.backbone.denoiser.named_parameters():
        torch.testing.assert_close(p.grad, reference[name].grad, rtol=1e-4, atol=1e-5)


def test_caches_do_not_change_the_losses(tiny: Path, images: Path) -> None:
    losses = []
    for cached in (True, False):
        spy = Spy()
        model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3))
        data = folder_data(images, flip=True, caption_dropout=0.3, cache_latents=cached, cache_text=cached)
        fit(model, data, 4, [spy])
        losses.append(spy.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(set(losses[0])) == 4


def test_validation_uses_the_same_noise_for_every_seed(tiny: Path, images: Path) -> None:
    """Without training, the validation loss is equal in all calls and for all seeds of the run."""
    validation_losses = []
    for seed in (0, 7):
        spy = Spy()
        model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(0.0), seed=seed)
        data = folder_data(images, hold_out=5, seed=seed)
        fit(model, data, 4, [spy], val_check_interval=2, check_val_every_n_epoch=None)
        assert len(spy.validation) == 2
        validation_losses += spy.validation
        assert len(set(spy.losses)) == 4
    assert len(set(validation_losses)) == 1


class RecordDtypes(Callback):
    """Records the dtypes of the weights during training."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        names = {name for name, _ in pl_module.trainable()}
        self.trained = {p.dtype for name, p in pl_module.named_parameters() if name in names}
        self.frozen = {
            part: {p.dtype for p in getattr(pl_module.backbone, part).parameters() if not p.requires_grad}
            for part in ("denoiser", "text_encoder", "vae")
        }


def test_bf16_mixed_casts_only_frozen_weights(tiny: Path, images: Path) -> None:
    model = LoRA(
        rank=2, targets=("cross_attention", "convolutions"), backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3)
    )
    spy, dtypes = Spy(), RecordDtypes()
    trainer = fit(
        model,
        folder_data(images, hold_out=5),
        2,
        [spy, dtypes],
        precision="bf16-mixed",
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    assert dtypes.trained == {torch.float32}
    assert dtypes.frozen == {"denoiser": {torch.bfloat16}, "text_encoder": {torch.bfloat16}, "vae": {torch.float32}}
    assert trainer.global_step == 2
    assert all(0 < loss < 10 for loss in (*spy.losses, *spy.validation))
    assert all(gradient.dtype == torch.float32 for gradient in spy.gradients[0].values())
    assert any(up.any() for _, up in model.weights().pairs.values())


def test_checkpoint_has_only_trained_tensors_and_other_models_refuse_it(
    tiny: Path, images: Path, tmp_path: Path
) -> None:
    source = Pretrained(str(tiny))
    model = LoRA(rank=2, backbone=source, optimizer=adamw(1e-3))
    trainer = fit(model, folder_data(images), 2)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {name for name, _ in model.trainable()}
    assert checkpoint["sdtune"] == {"backbone": source.hash(), "method": "LoRA", "ranks_in_file": {}}

    loaded = LoRA(rank=2, backbone=source)
    loaded.configure_model()
    loaded.on_load_checkpoint(checkpoint)
    loaded.load_state_dict(checkpoint["state_dict"])
    trained = dict(model.trainable())
    assert all(torch.equal(p, trained[name]) for name, p in loaded.trainable())

    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    fewer_targets = LoRA(rank=2, targets=["cross_attention"], backbone=source)
    fewer_targets.configure_model()
    with pytest.raises(
        UserError,
        match=r"^resume: \d+ trained tensors do not match those of the checkpoint, the first is backbone",
    ):
        fewer_targets.on_load_checkpoint(checkpoint)
    checkpoint["state_dict"] = {}
    with pytest.raises(UserError, match="do not match"):
        loaded.on_load_checkpoint(checkpoint)

    other_backbone = LoRA(rank=2, backbone=Pretrained(str(build_pipeline(tmp_path / "other", seed=1))))
    other_backbone.configure_model()
    with pytest.raises(UserError, match="^resume: the checkpoint was trained on another backbone"):
        other_backbone.on_load_checkpoint(torch.load(tmp_path / "saved.ckpt", weights_only=True))


def test_validation_loss_is_independent_of_the_objective(tiny: Path, images: Path) -> None:
    """With equal weights; otherwise a weighting that halves the loss would look like better weights."""
    losses = []
    for objective in (Objective(), Objective(MinSNR(0.1), offset_noise=0.5)):
        spy = Spy()
        model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(0.0), objective=objective)
        fit(model, folder_data(images, hold_out=2), 1, [spy], val_check_interval=1)
        losses.append((spy.losses, spy.validation))
    assert losses[0][1] == losses[1][1] != []
    assert losses[0][0] != losses[1][0]


def test_data_module_can_be_reused_with_a_second_model(tiny: Path, images: Path) -> None:
    """The caches of the first model are not used by a model that trains the VAE and the text encoder."""
    data, spy = folder_data(images), Spy()
    fit(LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3)), data, 1)
    model = Full(backbone=Pretrained(str(tiny)), parts=["denoiser", "text_encoder", "vae"], optimizer=adamw(1e-3))
    fit(model, data, 1, [spy])
    assert all(gradient.any() for gradient in spy.gradients[0].values())


def test_untrained_random_component_is_refused(tiny: Path, images: Path) -> None:
    source = Pretrained(str(tiny), from_scratch=["denoiser", "text_encoder"])
    model = Full(backbone=source, parts=["denoiser"], optimizer=adamw(1e-3))
    with pytest.raises(UserError, match=r"^backbone\.from_scratch: text_encoder has random weights"):
        check_trainable(model, folder_data(images))
    check_trainable(Full(backbone=source, parts=["denoiser", "text_encoder"]), folder_data(images))


def test_concrete_method_must_set_denoiser_is_read_only() -> None:
    class Abstract(Adapter):
        """A subclass that does not implement the abstract methods."""

    def body(**attributes: Any) -> dict[str, Any]:
        return {"inject": lambda self: None, "write_artifact": lambda self, folder, name: None, **attributes}

    assert type("WithValue", (Abstract,), body(denoiser_is_read_only=True)).denoiser_is_read_only
    with pytest.raises(TypeError, match="WithoutValue must set denoiser_is_read_only in its own class body"):
        type("WithoutValue", (Abstract,), body())
    with pytest.raises(TypeError, match="LoRASubclass must set denoiser_is_read_only"):
        type("LoRASubclass", (LoRA,), {})
