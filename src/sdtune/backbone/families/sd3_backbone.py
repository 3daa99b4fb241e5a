"""Backbone of SD 3 and 3.5: a multimodal diffusion transformer, two CLIP text encoders, and T5 (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtune.backbone.backbone import Backbone, PromptLimit
from sdtune.backbone.controlnet import AddedInputs, cast_conditions, with_added
from sdtune.backbone.families.base import T5
from sdtune.backbone.families.sd3_controlnet import SD3ControlNets
from sdtune.backbone.text import encoder_states, pooled_embedding
from sdtune.conditioning import Conditioning
from sdtune.hardware.devices import send
from sdtune.hardware.precision import autocast

_SKIPPED = 1  # the CLIP states are the penultimate ones, without the final norm
_T5_END, _T5_PAD = 1, 0


class _Waiting:
    """Holds a model that is no submodule of its owner; copies of the owner share it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Waiting:
        return self


class SD3Backbone(Backbone):
    """Backbone with an SD3Transformer2DModel.

    T5 is the largest text encoder by far, is never trained, and is needed only where prompts are encoded. So it is no
    submodule: it waits in main memory, and is on the device only within :meth:`encoders_on_device`. Without T5 its
    states are zeros, as in diffusers.
    """

    controlnets = SD3ControlNets()

    def __init__(self, tokenizers: Mapping[str, Any], encoders: Mapping[str, Any], **parts: Any) -> None:
        super().__init__(tokenizers, {name: encoder for name, encoder in encoders.items() if name != T5}, **parts)
        self._t5 = _Waiting(encoders[T5].requires_grad_(False).eval()) if T5 in encoders else None

    @property
    def encoders(self) -> dict[str, Any]:
        return super().encoders | ({T5: self._t5.model} if self._t5 else {})

    @property
    def trainable_encoders(self) -> dict[str, Any]:
        return super().encoders

    @property
    def prompt_limit(self) -> PromptLimit:
        return super().prompt_limit if self._t5 is None else PromptLimit(T5, self.facts.t5_tokens, 1)

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        tokens = self._token_count + self.facts.t5_tokens
        return {
            "states": (tokens, int(config.joint_attention_dim)),
            "pooled": (int(config.pooled_projection_dim),),
        }

    def frozen_prefixes(self, component: str) -> tuple[str, ...]:
        """As in the base class.

        The last block of the transformer drops its text tokens, so what makes queries of them has no effect. The first
        text encoder has no projection in single files (Stability-AI/sd3.5, ``sd3_infer.py``): it stays the identity.
        """
        if component == "denoiser":
            last = f"transformer_blocks.{self.denoiser.config.num_layers - 1}.attn."
            return (f"{last}add_q_proj.", f"{last}norm_added_q.")
        return ("text_projection.",) if component == "text_encoder" else ()

    # --- text

    @contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        """As in the base class; the denoiser waits in main memory meanwhile, unless other runs use it too."""
        device = self.device
        if self._t5 is None or self._t5.model.device == device:
            yield
            return
        denoiser = [self.denoiser] if self.pair_executor is None else []
        try:
            for model in denoiser:
                model.to("cpu")
            self._t5.model.to(device)
            yield
        finally:
            self._t5.model.to("cpu")
            for model in denoiser:
                model.to(device)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """States of both CLIP encoders, joined on the width, then those of T5, joined on the tokens; pooled embeddings.

        No state is masked: the transformer attends to padding too, in its authors' code as in diffusers.
        """
        states, pooled = [], []
        for tokenizer, (name, encoder) in zip(self.tokenizers, self.trainable_encoders.items(), strict=False):
            ids = send(self.tokenize(prompts, name), encoder.device)
            out = encoder(ids, output_hidden_states=True)
            states.append(encoder_states(encoder, out, _SKIPPED + self.clip_skip, norm=False))
            pooled.append(pooled_embedding(encoder, out, ids, tokenizer))
        clip = torch.cat(states, dim=-1)
        width = int(self.denoiser.config.joint_attention_dim)
        padded = F.pad(clip, (0, width - clip.shape[-1]))
        return Conditioning(torch.cat([padded, self._t5_states(prompts, padded)], dim=1), torch.cat(pooled, dim=-1))

    def encode_waiting(self, prompts: Sequence[str]) -> Tensor:
        """Final hidden states of T5, [B, T, D]."""
        assert self._t5 is not None
        with self.encoders_on_device():
            encoder = self._t5.model
            ids = send(torch.tensor(self._t5_ids(prompts)), encoder.device)
            # T5 overflows in float16 and has its own dtype: autocast is not for it.
            with autocast(encoder.device, "32-true"):
                states: Tensor = encoder(ids).last_hidden_state
        return states

    def _t5_states(self, prompts: Sequence[str], like: Tensor) -> Tensor:
        """Final hidden states of T5, [B, T, D] in the dtype of ``like`` [B, L, D]; zeros without T5."""
        if self._t5 is None:
            return like.new_zeros(len(prompts), self.facts.t5_tokens, like.shape[-1])
        cached = [self.waiting_states(prompt) for prompt in prompts]
        known = [states for states in cached if states is not None]
        states = send(torch.stack(known), like.device) if len(known) == len(cached) else self.encode_waiting(prompts)
        return states.to(like)

    def _t5_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of T5 tokens, cut and padded to ``facts.t5_tokens``, with the end token."""
        count = self.facts.t5_tokens
        cut = [[*row[: count - 1], _T5_END] for row in self.token_ids(prompts, T5)]
        return [row + [_T5_PAD] * (count - len(row)) for row in cut]

    # --- denoising

    def conditioning_arguments(self, conditioning: Conditioning, noisy: Tensor) -> dict[str, Any]:
        assert conditioning.mask is None, "the transformer attends to all states"
        return {"encoder_hidden_states": conditioning.states, "pooled_projections": conditioning.pooled}

    def denoiser_inputs(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, added: AddedInputs | None = None
    ) -> dict[str, Any]:
        dtype = self.denoiser.pos_embed.proj.weight.dtype
        inputs = cast_conditions(with_added(self.conditioning_arguments(conditioning, noisy), added or {}), dtype)
        if self.skipped_layers:
            inputs["skip_layers"] = list(self.skipped_layers)
        # The sampler's timestep has no dimensions, but the transformer needs one per sample.
        return {"hidden_states": noisy.to(dtype), "timestep": timesteps.expand(len(noisy)), **inputs}
