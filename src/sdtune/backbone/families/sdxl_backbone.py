"""SDXL conditioning: hidden states of two text encoders, a pooled text embedding, and image sizes.

Podell et al. 2023, "SDXL: improving latent diffusion models for high-resolution image synthesis", section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdtune.backbone.families.unet_backbone import UNetBackbone
from sdtune.backbone.text import encoder_states, pooled_embedding, unused_prefixes
from sdtune.conditioning import Conditioning
from sdtune.hardware.devices import send

# SDXL uses the penultimate hidden states of both encoders, without the final norm; clip_skip skips further layers.
_SKIPPED = 1


class SDXLBackbone(UNetBackbone):
    """SDXL backbone, conditioned on two text encoders and on image sizes."""

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().text_shapes, "pooled": (int(self.encoders["text_encoder_2"].config.projection_dim),)}

    def frozen_prefixes(self, component: str) -> tuple[str, ...]:
        # The pooled text embedding depends on all layers of the second encoder.
        if component != "text_encoder":
            return ()
        return unused_prefixes(self.encoders[component], _SKIPPED + self.clip_skip, norm=False)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Hidden states of both encoders, and the pooled text embedding of the second.

        The hidden states are the penultimate ones, or earlier ones with ``clip_skip``.
        """
        states, pooled, skip = [], None, _SKIPPED + self.clip_skip
        for tokenizer, (name, encoder) in zip(self.tokenizers, self.encoders.items(), strict=True):
            ids = send(self.tokenize(prompts, name), encoder.device)
            windows = ids.view(len(ids) * self.facts.windows, -1)
            out = encoder(windows, output_hidden_states=True)
            states.append(encoder_states(encoder, out, skip, norm=False).reshape(*ids.shape, -1))
            if name == "text_encoder_2":
                # Pool in the first window.
                pooled = pooled_embedding(encoder, out, windows, tokenizer).view(len(ids), self.facts.windows, -1)[:, 0]
        assert pooled is not None
        joined = torch.cat(states, dim=-1)
        return Conditioning(joined, pooled.to(joined.dtype))

    def conditioning_arguments(self, conditioning: Conditioning, noisy: Tensor) -> dict[str, Any]:
        frame = conditioning.frame
        if frame is None:
            factor = self.facts.factor
            height, width = noisy.shape[-2] * factor, noisy.shape[-1] * factor
            frame = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=noisy.device)
            frame = frame.expand(len(noisy), -1)
        added = {"text_embeds": conditioning.pooled, "time_ids": frame}
        return {**super().conditioning_arguments(conditioning, noisy), "added_cond_kwargs": added}
