"""A loaded Stable Diffusion: encode, predict, decode. The same for every method, in training and in sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtune.backbone.pretrained import Facts, Pretrained
from sdtune.objective.prediction import check
from sdtune.objective.schedule import NoiseSchedule

_SHORT_SEQUENCE = 1024
DECODED_PIXELS = 2 * 512 * 512  # of one call of the VAE's decoder, whose widest activation then takes about 0.5 GB


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """To bfloat16. The meta device has no autocast of its own: the CPU's stands for it (sdtune.planning.kernels)."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, torch.bfloat16, enabled=enabled)


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

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.unet.parameters()).device
        return device

    def suit(self, device: torch.device) -> None:
        """Fused attention; on a CPU plain products where latents are small: their backward is faster there.

        At long sequences the scores would fill the memory.
        """
        cells = (self.facts.side // self.facts.factor) ** 2
        plain = device.type == "cpu" and cells <= _SHORT_SEQUENCE
        self.unet.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())
        self.vae.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())
        self.text_encoder.set_attn_implementation("eager" if plain else "sdpa")
        if device.type == "cpu":
            self.unet.to(memory_format=torch.channels_last)

    # --- pictures

    def encode_images(self, pictures: Tensor) -> Tensor:
        """The VAE's posterior for ``pictures``: moments (mean, log-variance) in float32, [B, 2C, h, w].

        Autocast is off: in half precision the encoders of some VAEs overflow.
        """
        with autocast(pictures.device, False):
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
        with autocast(latents.device, False):
            for part in torch.split(raw.to(self.vae.dtype), max(1, DECODED_PIXELS // pixels)):
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

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The UNet's output for ``noisy`` [B, C, h, w] at ``timesteps`` [B] (or one) under ``text`` [B, L, D].

        Inputs take the UNet's dtype: a frozen half-precision UNet does not accept float32 activations.
        """
        dtype = self.unet.conv_in.weight.dtype
        out: Tensor = self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=text.to(dtype)).sample
        return out


def load(source: Pretrained, seed: int) -> Backbone:
    """Read ``source``: float32, eval mode, frozen."""
    facts = source.facts
    folder = source.folder()

    def component(name: str, kind: Any) -> Any:
        if name in source.from_scratch:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return from_config(name, folder, kind)
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


def from_config(name: str, folder: Path, kind: Any) -> Any:
    """Component ``name`` with weights drawn anew."""
    if name.startswith("text_encoder"):
        return kind(CLIPTextConfig.from_pretrained(folder / name))
    return kind.from_config(kind.load_config(folder / name))
