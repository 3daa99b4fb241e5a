"""A backbone by its configs alone: every module on the meta device, no weight read or downloaded."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdtune.backbone.backbone import Backbone, from_config
from sdtune.backbone.pretrained import Facts, Pretrained
from sdtune.backbone.residuals import Residuals


def shipped(kind: str) -> Path | None:
    """The folder of the configs of ``kind``, ``sd15`` and so on, that come with sdtune."""
    folder = Path(__file__).parent / "configs" / kind
    return folder if folder.is_dir() else None


def byte_tokenizer(max_tokens: int) -> CLIPTokenizer:
    """A tokenizer of CLIP's kind that knows single bytes alone: for where only lengths count."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_tokens)


class Outline(Pretrained):
    """What :class:`Pretrained` is, without its weights: for counting. SDXL has an outline too."""

    @cached_property
    def facts(self) -> Facts:
        return self.read_facts()

    @cached_property
    def _folder(self) -> Path:
        return self._snapshot(["*.json", "*/*.json", "tokenizer/*"])

    def load(self, seed: int = 0) -> Backbone:
        folder = self.folder()
        with torch.device("meta"):
            parts: dict[str, Any] = {
                "text_encoder": from_config("text_encoder", folder, CLIPTextModel),
                "vae": from_config("vae", folder, AutoencoderKL),
                "unet": from_config("unet", folder, UNet2DConditionModel),
            }
            second = "text_encoder_2" in self.config("")
            if second:
                parts["text_encoder_2"] = from_config("text_encoder_2", folder, CLIPTextModelWithProjection)
        kind = _TwoEncoders if second else Backbone
        # The schedule's tables are small, and checks of them need values.
        with torch.device("cpu"):
            backbone = kind(tokenizer=self._tokenizer(), scheduler_config=self.scheduler(), facts=self.facts, **parts)
        backbone.requires_grad_(False)
        return backbone.eval()

    def _tokenizer(self) -> CLIPTokenizer:
        """The folder's; one of single bytes where it has none, since only lengths count."""
        folder = self.folder() / "tokenizer"
        if folder.is_dir():
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        return byte_tokenizer(self.facts.max_tokens)


class _TwoEncoders(Backbone):
    """SDXL's conditioning: two text encoders' states side by side, a pooled state, sizes (Podell et al. 2023)."""

    def __init__(self, text_encoder_2: CLIPTextModelWithProjection, **parts: Any) -> None:
        super().__init__(**parts)
        self.text_encoder_2 = text_encoder_2

    def suit(self, device: torch.device) -> None:
        super().suit(device)
        self.text_encoder_2.set_attn_implementation(self.text_encoder.config._attn_implementation)

    def encode_text(self, prompts: Any) -> Tensor:
        ids = self.tokenize(prompts).to(self.text_encoder.device)
        encoders = (self.text_encoder, self.text_encoder_2)
        return torch.cat([encoder(ids, output_hidden_states=True).hidden_states[-2] for encoder in encoders], dim=-1)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor, added: Residuals | None = None) -> Tensor:
        assert added is None, "SDXL's ControlNets take its conditions too"
        dtype, count = self.unet.conv_in.weight.dtype, len(noisy)
        conditions = {
            "text_embeds": noisy.new_empty(count, self.text_encoder_2.config.projection_dim, dtype=dtype),
            "time_ids": noisy.new_empty(count, 6),
        }
        out: Tensor = self.unet(
            noisy.to(dtype), timesteps, encoder_hidden_states=text.to(dtype), added_cond_kwargs=conditions
        ).sample
        return out
