"""Training of pocket's AutoencoderKL on its image world: ``python -m sdtune.pocket.pretraining.vae FOLDER [STEPS]``.

Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", without the adversarial and
perceptual losses: for flat drawings, L1 + MSE + a small KL term is enough, and no other network is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdtune import streams
from sdtune.pocket.pretraining.loop import Pretraining, pretrain
from sdtune.pocket.world.arrays import training_images
from sdtune.pocket.world.scenes import SIDE
from sdtune.randomness import generator

SEED = 0
IMAGES = 40_000
STEPS = 4_500
BATCH = 32
CROP = 32
_KL_WEIGHT = 1e-4


def build_vae() -> AutoencoderKL:
    """Untrained VAE: 64x64x3 images to 16x16x4 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIDE,
    )


class CropBatches:
    """Batches of random crops; half of them have permuted color channels, so that the VAE generalizes to new colors.

    The last eighth of the steps uses full images in smaller batches.
    """

    def __init__(self, images: np.ndarray, steps: int) -> None:
        self.images, self.steps = images, steps

    def __call__(self, step: int) -> dict[str, Any]:
        rng = generator(SEED, streams.VAE_BATCH, step)
        full_images = step >= self.steps - self.steps // 8
        count, side = (BATCH // 4, SIDE) if full_images else (BATCH, CROP)
        crops = np.empty((count, side, side, 3), dtype=np.uint8)
        for k, index in enumerate(rng.integers(len(self.images), size=count)):
            x, y = rng.integers(0, SIDE - side + 1, size=2)
            crop = self.images[index][y : y + side, x : x + side]
            crops[k] = crop[..., rng.permutation(3)] if rng.random() < 0.5 else crop
        return {"pixels": torch.from_numpy(crops)}


class VAETraining(Pretraining):
    def __init__(self, steps: int = STEPS, lr: float = 1e-3) -> None:
        super().__init__(lr, steps, weight_decay=0.0)
        self.vae = build_vae().to(memory_format=torch.channels_last)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        pixels = batch["pixels"].permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self.vae.encode(pixels).latent_dist
        image = self.vae.decode(posterior.sample()).sample.float()
        mse = (image - pixels).square().mean()
        l1 = (image - pixels).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": l1 + 2 * mse + _KL_WEIGHT * kl, "mse": mse.detach(), "kl": kl.detach()}


@torch.no_grad()
def scaling_factor(vae: AutoencoderKL, images: np.ndarray) -> float:
    """1 / standard deviation of the latents of ``images`` (uint8 [N, H, W, 3]); Rombach et al. 2022, section G."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return float(1 / vae.encode(pixels).latent_dist.sample().std())


def main() -> None:
    folder = Path(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    images = training_images(folder, SEED, IMAGES)
    torch.manual_seed(SEED)
    module = VAETraining(steps)
    pretrain(module, CropBatches(images, steps), folder / "vae-training")
    vae = module.vae.eval().to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=scaling_factor(vae, images[:512]))
    vae.save_pretrained(folder / "vae")


if __name__ == "__main__":
    main()
