"""Backbone of SD 1.x and SD 2.x: a UNet and one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import AddedInputs, cast_conditions, with_added
from sdtune.backbone.families.unet_controlnet import UNetControlNets
from sdtune.backbone.text import encoder_states, unused_prefixes
from sdtune.conditioning import Conditioning
from sdtune.hardware.devices import send


class UNetBackbone(Backbone):
    """Backbone with a UNet that attends to the states of a CLIP text encoder."""

    controlnets = UNetControlNets()

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"states": (self._token_count, int(self.denoiser.config.cross_attention_dim))}

    def frozen_prefixes(self, component: str) -> tuple[str, ...]:
        encoder = self.encoders.get(component)
        return () if encoder is None else unused_prefixes(encoder, self.clip_skip)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Hidden states after the final norm, respecting ``clip_skip``."""
        [encoder] = self.encoders.values()
        ids = send(self.tokenize(prompts), encoder.device)
        out = encoder(ids.view(len(ids) * self.facts.windows, -1), output_hidden_states=self.clip_skip > 0)
        states = encoder_states(encoder, out, self.clip_skip) if self.clip_skip else out.last_hidden_state
        return Conditioning(states.reshape(*ids.shape, -1))

    def conditioning_arguments(self, conditioning: Conditioning, noisy: Tensor) -> dict[str, Any]:
        mask = {} if conditioning.mask is None else {"encoder_attention_mask": conditioning.mask}
        return {"encoder_hidden_states": conditioning.states, **mask}

    def denoiser_inputs(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, added: AddedInputs | None = None
    ) -> dict[str, Any]:
        dtype = self.denoiser.conv_in.weight.dtype
        inputs = cast_conditions(with_added(self.conditioning_arguments(conditioning, noisy), added or {}), dtype)
        return {"sample": noisy.to(dtype), "timestep": timesteps, **inputs}
