"""Training of pocket's CLIP on its image world: ``python -m sdtune.pocket.pretraining.clip FOLDER [STEPS]``.

Symmetric contrastive loss over a batch of images and captions (Radford et al. 2021, "Learning transferable visual
models from natural language supervision"). The text model becomes the backbone's text encoder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from sdtune import streams
from sdtune.pocket.pretraining import tokenizer as tokenizers
from sdtune.pocket.pretraining.loop import Pretraining, pretrain
from sdtune.pocket.pretraining.vae import IMAGES, SEED
from sdtune.pocket.world.arrays import caption, training_images
from sdtune.pocket.world.scenes import SIDE
from sdtune.randomness import generator

STEPS = 1_200
BATCH = 192


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Untrained CLIP model; its text width of 192 matches the UNet's cross-attention."""
    layers = {"num_hidden_layers": 4, "num_attention_heads": 6, "hidden_size": 192, "intermediate_size": 512}
    return CLIPModel(
        CLIPConfig(
            text_config={
                **layers,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": tokenizers.MAX_LENGTH,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "projection_dim": 128,
            },
            vision_config={**layers, "image_size": SIDE, "patch_size": 8, "projection_dim": 128},
            attn_implementation="eager",  # the backward pass of fused attention is slow on a CPU for short sequences
            projection_dim=128,
        )
    )


class CaptionBatches:
    """Batches of images with tokenized captions."""

    def __init__(self, images: np.ndarray, tokenizer: CLIPTokenizer) -> None:
        self.images, self.tokenizer = images, tokenizer

    def __call__(self, step: int) -> dict[str, Any]:
        rng = generator(SEED, streams.CLIP_BATCH, step)
        indices = rng.choice(len(self.images), size=BATCH, replace=False)
        tokens = self.tokenizer(
            [caption(SEED, int(i)) for i in indices], padding="max_length", truncation=True, return_tensors="pt"
        )
        return {"pixels": torch.from_numpy(self.images[np.sort(indices)][np.argsort(np.argsort(indices))]), **tokens}


class CLIPTraining(Pretraining):
    def __init__(self, tokenizer: CLIPTokenizer, steps: int = STEPS, lr: float = 1e-3) -> None:
        super().__init__(lr, steps, weight_decay=0.05)
        self.clip = build_clip(tokenizer)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        pixels = batch["pixels"].permute(0, 3, 1, 2).float() / 127.5 - 1
        out = self.clip(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=pixels)
        logits = out.logits_per_text.float()
        truth = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        return {"loss": loss, "retrieval": (logits.argmax(1) == truth).float().mean().detach()}


def main() -> None:
    folder = Path(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    images = training_images(folder, SEED, IMAGES)
    tokenizer = tokenizers.trained_tokenizer(folder / "tokenizer", SEED)
    torch.manual_seed(SEED)
    module = CLIPTraining(tokenizer, steps)
    pretrain(module, CaptionBatches(images, tokenizer), folder / "clip-training")
    module.clip.save_pretrained(folder / "clip")


if __name__ == "__main__":
    main()
