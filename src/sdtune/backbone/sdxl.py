"""SDXL conditioning: hidden states of two text encoders, a pooled text embedding, and image sizes.

Podell et al. 2023, "SDXL: improving latent diffusion models for high-resolution image synthesis", section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.text import encoder_states, unused_prefixes
from sdtune.conditioning import Conditioning
from sdtune.hardware.devices import send

# SDXL uses the penultimate hidden states of both encoders, without the final norm; clip_skip skips further layers.
_SKIPPED = 1


class SDXLBackbone(Backbone):
    """SDXL backbone, conditioned on two text encoders and on image sizes."""

    def __init__(self, text_encoder_2: CLIPTextModelWithProjection, tokenizer_2: CLIPTokenizer, **parts: Any) -> None:
        super().__init__(**parts)
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2

    @property
    def encoders(self) -> dict[str, Any]:
        return {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        return (self.tokenizer, self.tokenizer_2)

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().text_shapes, "pooled": (int(self.text_encoder_2.config.projection_dim),)}

    def unused_prefixes(self, component: str) -> tuple[str, ...]:
        # The pooled text embedding depends on all layers of the second encoder.
        return (
            ()
            if component == "text_encoder_2"
            else unused_prefixes(self.text_encoder, _SKIPPED + self.clip_skip, norm=False)
        )

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Hidden states of both encoders, and the pooled text embedding of the second.

        The hidden states are the penultimate ones, or earlier ones with ``clip_skip``.
        """
        states, pooled, skip = [], None, _SKIPPED + self.clip_skip
        for tokenizer, encoder in zip(self.tokenizers, self.encoders.values(), strict=True):
            ids = send(self.tokenize(prompts, tokenizer), encoder.device)
            windows = ids.view(len(ids) * self.facts.windows, -1)
            out = encoder(windows, output_hidden_states=True)
            states.append(encoder_states(encoder, out, skip, norm=False).reshape(*ids.shape, -1))
            if encoder is self.text_encoder_2:
                # Pool at the end token of the first window. With `eos_token_id: 2` in the config, transformers would
                # pool at the largest id, which is a new token if the prompt contains one.
                ends = (windows == tokenizer.eos_token_id).int().argmax(-1)
                last = out.last_hidden_state[torch.arange(len(windows), device=ends.device), ends]
                pooled = encoder.text_projection(last).view(len(ids), self.facts.windows, -1)[:, 0]
        assert pooled is not None
        joined = torch.cat(states, dim=-1)
        return Conditioning(joined, pooled.to(joined.dtype))

    def conditions(self, conditioning: Conditioning, noisy: Tensor) -> dict[str, Any]:
        frame = conditioning.frame
        if frame is None:
            factor = self.facts.factor
            height, width = noisy.shape[-2] * factor, noisy.shape[-1] * factor
            frame = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=noisy.device)
            frame = frame.expand(len(noisy), -1)
        added = {"text_embeds": conditioning.pooled, "time_ids": frame}
        return {**super().conditions(conditioning, noisy), "added_cond_kwargs": added}
