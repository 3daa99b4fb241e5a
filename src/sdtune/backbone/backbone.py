"""A loaded Stable Diffusion: encode, predict, decode. The same for every method, in training and in sampling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtune.backbone.pretrained import Facts, Pretrained
from sdtune.backbone.residuals import Net, Residuals, residuals
from sdtune.objective.prediction import check
from sdtune.objective.schedule import NoiseSchedule

_SHORT_SEQUENCE = 1024
_DECODED_PIXELS = 2 * 512 * 512  # of one call of the VAE's decoder, whose widest activation then takes about 0.5 GB


class Backbone(nn.Module):
    """Tokenizer, text encoder, VAE, UNet and noise schedule of one Stable Diffusion.

    Pictures are float [B, 3, H, W] in [-1, 1]; latents are [B, C, H / factor, W / factor], scaled to about unit
    variance; text states are [B, L, D].
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler_config: dict[str, Any],
        facts: Facts,
    ) -> None:
        super().__init__()
        self.tokenizer, self.text_encoder, self.vae, self.unet = tokenizer, text_encoder, vae, unet
        self.scheduler_config, self.facts = scheduler_config, facts
        self.schedule = NoiseSchedule.from_config(scheduler_config)
        self.prediction_type = check(facts.prediction_type)
        self.nets: tuple[Net, ...] = ()
        """ControlNets that act when sampling; :func:`sdtune.controlnets.applied` puts them there."""

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.unet.parameters()).device
        return device

    def suit(self, device: torch.device, *beside: Any) -> None:
        """Fused attention; on a CPU plain products where latents are small: their backward is faster there.

        At long sequences the scores would fill the memory. ``beside`` are further models with attentions like the
        UNet's.
        """
        cells = (self.facts.side // self.facts.factor) ** 2
        plain = device.type == "cpu" and cells <= _SHORT_SEQUENCE
        for model in (self.unet, self.vae, *beside):
            model.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())
        self.text_encoder.set_attn_implementation("eager" if plain else "sdpa")
        if device.type == "cpu":
            for model in (self.unet, *beside):
                model.to(memory_format=torch.channels_last)

    # --- pictures

    def encode_images(self, pictures: Tensor) -> Tensor:
        """The VAE's posterior for ``pictures``: moments (mean, log-variance) in float32, [B, 2C, h, w].

        Autocast is off: in half precision the encoders of some VAEs overflow.
        """
        with torch.autocast(pictures.device.type, enabled=False):
            moments: Tensor = self.vae.encode(pictures.to(self.vae.dtype)).latent_dist.parameters
        return moments.float()

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior with the given standard normal ``noise`` [B, C, h, w], scaled for the UNet."""
        mean, log_variance = moments.chunk(2, dim=1)
        drawn = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
        shift: float = self.vae.config.shift_factor or 0.0
        scale: float = self.vae.config.scaling_factor
        return (drawn - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1], float32 [B, 3, H, W], from scaled ``latents``."""
        raw = latents.float() / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        pixels = raw.shape[2] * raw.shape[3] * self.facts.factor**2
        pictures: list[Tensor] = []
        with torch.autocast(latents.device.type, enabled=False):
            for part in torch.split(raw.to(self.vae.dtype), max(1, _DECODED_PIXELS // pixels)):
                pictures.append(self.vae.decode(part).sample.float())
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)

    # --- text

    def count_tokens(self, prompt: str) -> int:
        """Tokens of ``prompt`` with its start and end, untruncated; ``facts.max_tokens`` is the limit."""
        return len(self.tokenizer(prompt).input_ids)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids, int64 [B, L], padded and truncated to the encoder's length."""
        ids: Tensor = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.facts.max_tokens,
            return_tensors="pt",
        ).input_ids
        return ids

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """The text encoder's last states after its final norm, [B, L, D]: what SD 1.x and 2.x are conditioned on."""
        ids = self.tokenize(prompts).to(self.text_encoder.device)
        states: Tensor = self.text_encoder(ids).last_hidden_state
        return states

    # --- denoising

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor, added: Residuals | None = None) -> Tensor:
        """The UNet's output for ``noisy`` [B, C, h, w] at ``timesteps`` [B] (or one) under ``text`` [B, L, D].

        Inputs take the UNet's dtype: a frozen half-precision UNet does not accept float32 activations.
        """
        dtype = self.unet.conv_in.weight.dtype
        control: dict[str, Any] = {}
        if added is not None:
            control["down_block_additional_residuals"] = tuple(r.to(dtype) for r in added.skips)
            control["mid_block_additional_residual"] = added.middle.to(dtype)
        out: Tensor = self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=text.to(dtype), **control).sample
        return out

    def predict_under(self, noisy: Tensor, timesteps: Tensor, text: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """:meth:`predict` under ``nets``, one map (float32 [B, 3, H, W] in [0, 1]) each; plainly without either."""
        pairs = zip(self.nets, maps, strict=True) if self.nets and maps else ()
        # At strength 0 a net is not asked: the base then costs what it costs.
        added = [residuals(n.model, noisy, timesteps, text, own, n.strength) for n, own in pairs if n.strength]
        return self.predict(noisy, timesteps, text, reduce(Residuals.__add__, added) if added else None)


def load(source: Pretrained, seed: int) -> Backbone:
    """Read ``source``: float32, eval mode, frozen."""
    facts = source.facts
    folder = source.folder()

    def component(name: str, kind: Any) -> Any:
        if name in source.from_scratch:
            return _from_scratch(name, folder, kind, seed)
        return kind.from_pretrained(
            folder / name, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )

    backbone = Backbone(
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        text_encoder=component("text_encoder", CLIPTextModel),
        vae=component("vae", AutoencoderKL),
        unet=component("unet", UNet2DConditionModel),
        scheduler_config=source.config("scheduler"),
        facts=facts,
    )
    backbone.requires_grad_(False)
    return backbone.eval()


def _from_scratch(name: str, folder: Path, kind: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "text_encoder":
            return kind(CLIPTextConfig.from_pretrained(folder / name))
        return kind.from_config(kind.load_config(folder / name))
