"""Attention processors: diffusers' default ones are replaced by the implementation that suits the device."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class PlainAttnProcessor:
    """Attention of a transformer block by ``scaled_dot_product_attention``, with fewer kernels and less host time.

    Computes the same as diffusers' ``AttnProcessor2_0`` for layers without norms, residual connection and rescaling
    (Vaswani et al. 2017, equation 1). Calls with an attention mask are passed to ``AttnProcessor2_0``.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention output [B, N, D] for ``hidden_states`` [B, N, D] and ``encoder_hidden_states`` [B, L, C].

        Args:
            encoder_hidden_states: the text embeddings; None for self-attention.
        """
        if attention_mask is not None:
            masked: Tensor = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)
            return masked
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        out = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out

    # Attention.forward inspects the signature in each call; with this attribute, it is not derived from the code again.
    __call__.__signature__ = inspect.signature(__call__)  # type: ignore[attr-defined]


_DEFAULTS = (AttnProcessor, AttnProcessor2_0, PlainAttnProcessor)


def set_attention(model: Any, *, sdpa: bool) -> None:
    """Replace diffusers' default attention processors in ``model``; keep all others, such as those of an IP-Adapter.

    Args:
        sdpa: use ``scaled_dot_product_attention``; otherwise separate matrix products and a softmax.
    """
    layers = {f"{name}.processor": layer for name, layer in model.named_modules() if isinstance(layer, Attention)}
    model.set_attn_processor(
        {
            name: _processor(layers.get(name), sdpa) if type(processor) in _DEFAULTS else processor
            for name, processor in model.attn_processors.items()
        }
    )


def _processor(layer: Attention | None, sdpa: bool) -> AttnProcessor | AttnProcessor2_0 | PlainAttnProcessor:
    if not sdpa:
        return AttnProcessor()
    return PlainAttnProcessor() if layer is not None and _is_plain(layer) else AttnProcessor2_0()


def _is_plain(layer: Attention) -> bool:
    """Whether ``layer`` has no norms, residual connection or rescaling, like those of the UNet's transformers."""
    norms = (layer.spatial_norm, layer.group_norm, layer.norm_cross, layer.norm_q, layer.norm_k)
    return all(norm is None for norm in norms) and not layer.residual_connection and layer.rescale_output_factor == 1
