"""Encode images to latents, and decode latents to images, with the VAE of a backbone."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from sdtune.backbone.families import Facts
from sdtune.hardware.precision import autocast

DECODED_PIXELS = 2 * 512 * 512
"""Pixels per call of the VAE decoder; its largest activation then needs about 0.5 GB."""

TILE = 512
"""Side in pixels of the tiles for tiled decoding of large images."""


class LatentCodec(nn.Module):
    """Base class of a backbone: its VAE.

    Images are float [B, 3, H, W] in [-1, 1]; latents are [B, C, H / factor, W / factor], scaled to about unit variance.
    """

    vae: AutoencoderKL
    facts: Facts

    def __init__(self) -> None:
        super().__init__()
        self.decodes_in_tiles = False
        """Whether large images are decoded in tiles; see :meth:`decode_in_tiles`."""

    def encode_images(self, images: Tensor) -> Tensor:
        """VAE posterior of ``images``: moments (mean, log-variance), float32 [B, 2C, h, w].

        Autocast is disabled: some VAE encoders overflow in half precision.
        """
        with autocast(images.device, "32-true"):
            moments: Tensor = self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters
        return moments.float()

    @staticmethod
    def _sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise

    def reconstruct(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Decode a sample of the VAE posterior to float32 [B, 3, H, W], about [-1, 1]; differentiable."""
        with autocast(moments.device, "32-true"):
            images: Tensor = self.vae.decode(self._sample_posterior(moments, noise).to(self.vae.dtype)).sample
        return images.float()

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample of the VAE posterior for standard normal ``noise`` [B, C, h, w], scaled for the denoiser."""
        return self.scaled(self._sample_posterior(moments, noise))

    def scaled(self, sample: Tensor, *, shifted: bool = True) -> Tensor:
        """Latents for the denoiser from a ``sample`` of the VAE posterior; ``shifted``: with the VAE's shift."""
        shift: float = (self.vae.config.shift_factor or 0.0) if shifted else 0.0
        scale: float = self.vae.config.scaling_factor
        return (sample - shift) * scale

    def decode_in_tiles(self, side: int = TILE) -> None:
        """Turn on tiled decoding for images larger than ``side`` pixels, to limit memory.

        Colors may differ slightly from untiled decoding, because the VAE normalizes each tile separately.
        """
        self.decodes_in_tiles = True
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = side, side // self.facts.factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled ``latents`` to images in [0, 1], float32 [B, 3, H, W]."""
        raw = latents.float() / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        pixels = raw.shape[2] * raw.shape[3] * self.facts.factor**2
        # Call tiled_decode directly: enable_tiling would also tile the encoder and change the latents.
        tiles = self.decodes_in_tiles and max(raw.shape[2:]) > self.vae.tile_latent_min_size
        decode = self.vae.tiled_decode if tiles else self.vae.decode
        images: list[Tensor] = []
        with autocast(latents.device, "32-true"):
            for part in torch.split(raw.to(self.vae.dtype), max(1, DECODED_PIXELS // pixels)):
                images.append(decode(part).sample.float())
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)
