"""Check before the benchmark: sdtune and plain diffusers have equal losses and gradients for the same noise."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel, DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from experiments.benchmark.commands import Shape
from sdtune.backbone import Pretrained
from sdtune.backbone.new_tokens import NewToken
from sdtune.methods import ControlNet, DreamBooth, Full, LoRA, TextualInversion
from sdtune.methods.base import Adapter
from sdtune.randomness import generator

TOLERANCE = 1e-5
PROMPTS, POSITIONS, STEP, SEED = ["a photo of a <new> cat", "a dog"], [4, 5], 7, 11
INIT = "cat"


def gate(shape: Shape) -> dict[str, Any]:
    """Differences of losses and gradients for each method, relative to the largest loss and to each tensor's norm.

    Raises:
        RuntimeError: a difference exceeds TOLERANCE, so the benchmark would compare different work.
    """
    source = Pretrained(str(shape.weights))
    common: dict[str, Any] = {"backbone": source, "seed": SEED}
    adapters: dict[str, Adapter] = {
        "lora": LoRA(rank=4, **common),
        "textual_inversion": TextualInversion(new_tokens=[NewToken("<new>", init=INIT)], **common),
        "dreambooth": DreamBooth(**common),
        "full": Full(**common),
        "controlnet": ControlNet(**common),
    }
    differences: dict[str, Any] = {}
    for method, adapter in adapters.items():
        differences[method] = _differences(method, adapter, shape)
        worst = max(differences[method].values())
        if not worst <= TOLERANCE:
            raise RuntimeError(f"gate: {method} differs from plain diffusers by {worst:.1e}, more than {TOLERANCE:g}")
    return differences


def _differences(method: str, adapter: Adapter, shape: Shape) -> dict[str, float]:
    torch.manual_seed(0)
    prompts = PROMPTS if method == "textual_inversion" else [p.replace("<new> ", "") for p in PROMPTS]
    pixels = torch.rand(2, 3, shape.side, shape.side) * 2 - 1
    batch = {"prompts": prompts, "step": STEP, "positions": POSITIONS, "pixels": pixels}
    batch["conditions"] = {"control": torch.rand(2, 3, shape.side, shape.side)}
    adapter.configure_model()
    for _, parameter in adapter.trainable():
        if not parameter.any():  # layers before a zero weight would have no gradient
            nn.init.normal_(parameter, std=0.02)
    loss = adapter.losses(batch)
    loss.mean().backward()  # type: ignore[no-untyped-call]
    expected, gradients = _plain_diffusers(method, adapter, shape, batch)
    ours = {name: p.grad for name, p in adapter.trainable()}
    if len(ours) != len(gradients):
        raise RuntimeError(f"gate: {method} trains {len(ours)} tensors, plain diffusers {len(gradients)}")
    return {
        "loss": float((loss - expected).abs().max() / expected.abs().max()),
        "gradients": max(_relative_difference(ours[name], reference) for name, reference in gradients.items()),
    }


def _relative_difference(ours: Tensor | None, reference: Tensor) -> float:
    assert ours is not None
    return float((ours - reference).norm() / reference.norm().clamp_min(1e-8))


def _plain_diffusers(
    method: str, adapter: Adapter, shape: Shape, batch: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [2] of diffusers' and peft's modules, and gradients by the adapter's parameter names."""
    pipe = StableDiffusionPipeline.from_pretrained(shape.weights, local_files_only=True, torch_dtype=torch.float32)
    unet, encoder, tokenizer = pipe.unet.train(), pipe.text_encoder, pipe.tokenizer
    for model in (unet, encoder, pipe.vae):
        model.requires_grad_(False)
    values = dict(adapter.trainable())
    pairs: dict[str, nn.Parameter] = {}
    net: nn.Module | None = None
    if method == "lora":
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        pairs = {f"backbone.denoiser.{n}": p for n, p in unet.named_parameters() if p.requires_grad}
    elif method == "textual_inversion":
        tokenizer.add_tokens("<new>")
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[-1] = next(iter(values.values()))[0]
        table.requires_grad_(True)
    elif method == "controlnet":
        widths = adapter.get_submodule("controlnet").config.conditioning_embedding_out_channels  # type: ignore[union-attr]
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths).train()
        pairs = {f"controlnet.{n}": p for n, p in net.named_parameters()}
    else:
        unet.requires_grad_(True)
        pairs = {f"backbone.denoiser.{n}": p for n, p in unet.named_parameters()}
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(values[name])
    output, noise = _output(pipe, net, batch)
    kind = pipe.scheduler.config.prediction_type
    assert kind == "epsilon", kind
    losses = (output - noise).square().mean((1, 2, 3))
    losses.mean().backward()  # type: ignore[no-untyped-call]
    if method == "textual_inversion":
        return losses.detach(), {next(iter(values)): table.grad[-1:]}
    return losses.detach(), {name: p.grad for name, p in pairs.items() if p.grad is not None}


def _output(pipe: Any, net: nn.Module | None, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Prediction of the UNet, and the noise that it should predict."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        posterior = pipe.vae.encode(batch["pixels"]).latent_dist
        shape = posterior.mean.shape[1:]
        sample = posterior.mean + posterior.std * drawn("train/vae", shape)
        latents = sample * pipe.vae.config.scaling_factor
    noise = drawn("train/noise", shape)
    times = torch.tensor(
        [int(generator(SEED, "train/timestep", STEP, p).integers(len(scheduler.betas))) for p in POSITIONS]
    )
    ids = pipe.tokenizer(
        batch["prompts"],
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    text = pipe.text_encoder(ids)[0]
    noisy = scheduler.add_noise(latents, noise, times)
    residuals = {}
    if net is not None:
        down, mid = net(
            noisy, times, encoder_hidden_states=text, controlnet_cond=batch["conditions"]["control"], return_dict=False
        )
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return pipe.unet(noisy, times, encoder_hidden_states=text, **residuals).sample, noise


def drawn(stream: str, shape: torch.Size) -> Tensor:
    """Normal noise of both samples from a random stream, float32 [2, *shape]."""
    rows = [generator(SEED, stream, STEP, p).standard_normal(tuple(shape), dtype="float32") for p in POSITIONS]
    return torch.stack([torch.from_numpy(row) for row in rows])
